"""Grid rows in parallel (--lookahead zipar:S) beside one token at a time: passes, score, time.

    python -m benchmarks.zipar [--captions 300] [--rounds 7] [--starts 4,8,12,16,24]

Captions are those of held-out scenes of the demo model, the cache is full, ONNX Runtime on one
thread. The score is of batches of 16; the difference from off is of pairs of images with the same
caption and random numbers. Times are of single images, all modes in turns. A start of 24, the
grid's width, is single steps by another graph: the same tokens, up to near ties.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.metrics.intervals import Mean
from ssd_export.metrics.scene_score import (
    GenerateOptions,
    SceneScore,
    draw_scenes,
    generate,
    score_scenes,
)
from ssd_export.plan.lookahead import OFF
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.sampling import ZIPAR

OUT = Path("docs/measurements/zipar.json")
SCORE_COLUMNS = (
    "lookahead",
    "images",
    "passes",
    "tokens a pass",
    "scene score, %",
    "less off, points",
    "images with the tokens of off",
)
SPEED_COLUMNS = ("lookahead", "images", "CPU ms a token", "times faster")
Mode = int | str


def score_rows(
    generator: ImageGenerator, modes: tuple[Mode, ...], captions: int, batch: int
) -> list[list[Any]]:
    """A row for each mode, off first."""
    scenes = draw_scenes(captions, 0)
    rows, off = [], None
    for mode in modes:
        scored = score_scenes(generator, scenes, GenerateOptions(batch=batch, lookahead=mode))
        off = off or scored
        rows.append([named(mode), captions, *figures(generator, scored, off)])
        say(str(rows[-1]))
    return rows


def figures(generator: ImageGenerator, scored: SceneScore, off: SceneScore) -> list[Any]:
    """The other cells of a row."""
    oks, others = ([100.0 * verdict.ok for verdict in each.verdicts] for each in (scored, off))
    difference = Mean.of_differences(oks, others)
    passes = generator.passes  # of the last batch: the same of every batch
    return [
        passes,
        round((generator.config.grid.num_tokens - 1) / passes, 2),
        round(100 * scored.overall.value, 1),
        "-" if scored is off else f"{difference.value:+.1f} ± {difference.half_width:.1f}",
        int((scored.tokens == off.tokens).all(axis=1).sum()),
    ]


def speed_rows(generator: ImageGenerator, modes: tuple[Mode, ...], rounds: int) -> list[list[Any]]:
    """A row for each mode, off first."""
    captions = [scene.caption for scene in draw_scenes(rounds + 1, 0)]
    times: dict[Mode, list[float]] = {mode: [] for mode in modes}
    for caption in captions:
        for mode, own in times.items():
            options = GenerateOptions(batch=1, lookahead=mode)
            own.append(generate(generator, [caption], options).cpu_ms_per_token)
    off = times[modes[0]][1:]  # the first round opens the graphs
    rows = []
    for mode, own in times.items():
        faster = statistics.median(a / b for a, b in zip(off, own[1:], strict=True))
        rows.append([named(mode), rounds, round(statistics.median(own[1:]), 3), f"{faster:.2f}"])
        say(str(rows[-1]))
    return rows


def named(mode: Mode) -> str:
    """A mode as --lookahead has it."""
    return "off" if mode == OFF else str(mode)


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--captions", type=int, default=300, help="of the scores")
    parser.add_argument("--rounds", type=int, default=7, help="of the times")
    parser.add_argument("--starts", default="4,8,12,16,24", help="S of zipar:S")
    parser.add_argument("--batch", type=int, default=16, help="of the scores")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    modes: tuple[Mode, ...] = (OFF, *(f"{ZIPAR}{start}" for start in asked.starts.split(",")))
    command = shlex.join(["python", "-m", "benchmarks.zipar", *sys.argv[1:]])
    with (
        temporary_bundle(PolicyChoice(policy="full", budget=1.0)) as path,
        ImageGenerator.from_bundle(path, "ort", num_threads=1) as generator,
    ):
        speed = speed_rows(generator, modes, asked.rounds)
        scores = score_rows(generator, modes, asked.captions, asked.batch)
    tables = [
        table("Grid rows in parallel: passes and scene score", SCORE_COLUMNS, scores),
        table("Grid rows in parallel: time of a token, one image", SPEED_COLUMNS, speed),
    ]
    write_measurement(asked.out, measurement(command, {"tables": tables}, asked.note))


if __name__ == "__main__":
    main()
