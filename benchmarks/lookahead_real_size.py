"""`auto` beside single steps at the shape of Janus-Pro-1B, some of its layers: whether lookahead
costs time where it does not pay, and gains it where it does.

    python -m benchmarks.lookahead_real_size [--layers 4] [--grid-rows 23] [--rounds 3]

Weights are random. Sampled at the usual temperature drafts are then hardly ever right: the worst
case, in which `auto` has to turn off. Greedy, an image soon repeats itself and drafts are right:
the best case. Off, auto and a fixed window run in turns, on the same prompt and random numbers; the
clock runs from the prompt to the last grid row that is asked for. The exit code is 1 where
auto took more than 3 % longer than off, by the median of the rounds' ratios of CPU time.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.synthetic_checkpoint import SHAPES, write_checkpoint
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator

OUT = Path("docs/measurements/lookahead_real_size.json")
PROMPT = "a red circle on white"
OFF, AUTO = 1, "auto"
FIXED = 8
MODES: tuple[int | str, ...] = (OFF, AUTO, FIXED)
DRAWS = {"sampled": None, "greedy": 0.0}
SLOWER = 1.03  # the most that auto may take of what single steps take
CACHES = {"full": ("full", 1.0, None), "h2o 0.2": ("h2o", 0.2, 24)}  # policy, budget, lookahead
COLUMNS = (
    "weights",
    "cache",
    "tokens are",
    "lookahead",
    "rounds",
    "passes",
    "tokens a pass",
    "ms a token",
    "CPU ms a token",
    "of off's time",
    "by CPU time",
    "same tokens",
)


@dataclass(frozen=True)
class Run:
    """Tokens of the grid rows, how many passes they took, seconds by the clock and of all threads,
    the prompt's included.
    """

    tokens: np.ndarray
    passes: int
    seconds: float
    cpu_seconds: float


@contextmanager
def opened(model: Path, weights: str, cache: str, threads: int) -> Iterator[ImageGenerator]:
    """A generator for the checkpoint under a cache."""
    policy, budget, lookahead = CACHES[cache]
    choice = PolicyChoice(str(model), policy, budget, weights=weights, lookahead=lookahead)
    with (
        temporary_bundle(choice) as path,
        ImageGenerator.from_bundle(path, "ort", num_threads=threads) as generator,
    ):
        yield generator


def run(
    generator: ImageGenerator, mode: int | str, grid_rows: int, temperature: float | None
) -> Run:
    """Generates the first grid rows of an image."""
    events = generator.stream(
        [PROMPT],
        temperature=temperature,
        lookahead=mode,  # type: ignore[arg-type]
    )
    taken = grid_rows * generator.config.grid.width
    with closing(events):  # type: ignore[type-var]
        began, cpu_began = time.perf_counter(), time.process_time()
        event = next(event for event in events if event.row == grid_rows - 1)
        seconds, computed = time.perf_counter() - began, time.process_time() - cpu_began
        passes = min(generator.passes, taken - 1)  # a whole image's where nothing counts them
    return Run(event.tokens[0, :taken], passes, seconds, computed)


def rows_of(
    generator: ImageGenerator, names: Sequence[str], drawn: str, grid_rows: int, rounds: int
) -> list[list[object]]:
    """A row for each mode."""
    made: dict[int | str, list[Run]] = {mode: [] for mode in MODES}
    for mode in MODES:
        run(generator, mode, 1, DRAWS[drawn])  # opens the graphs
    for number in range(rounds):
        for mode in MODES if number % 2 else reversed(MODES):
            made[mode].append(run(generator, mode, grid_rows, DRAWS[drawn]))
    num_tokens = grid_rows * generator.config.grid.width
    off, rows = made[OFF], []
    for mode, counted in made.items():
        passes = statistics.fmean(one.passes for one in counted)
        times = [1000 * statistics.median(one.seconds for one in counted)]
        times.append(1000 * statistics.median(one.cpu_seconds for one in counted))
        ratios = [
            statistics.median(a.seconds / b.seconds for a, b in zip(counted, off, strict=True)),
            statistics.median(
                a.cpu_seconds / b.cpu_seconds for a, b in zip(counted, off, strict=True)
            ),
        ]
        same = sum(bool((a.tokens == b.tokens).all()) for a, b in zip(counted, off, strict=True))
        name = "off" if mode == OFF else str(mode)
        rows.append(
            [*names, drawn, name, rounds, round(passes), f"{(num_tokens - 1) / passes:.2f}"]
            + [f"{one / num_tokens:.2f}" for one in times]
            + [f"{ratio:.3f}" for ratio in ratios]
            + [f"{same} of {rounds}"]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def too_slow(rows: Sequence[Sequence[object]]) -> list[str]:
    """The rows of auto that take longer than they may, by the CPU's time."""
    column, mode = COLUMNS.index("by CPU time"), COLUMNS.index("lookahead")
    return [
        ", ".join(map(str, row[:3])) + f": {row[column]}"
        for row in rows
        if row[mode] == AUTO and float(str(row[column])) > SLOWER
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="janus-pro-1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--weights", default="none,int8,int4", help="formats, comma-separated")
    parser.add_argument("--caches", default="h2o 0.2", help=f"of {', '.join(CACHES)}")
    parser.add_argument("--grid-rows", type=int, default=23, help="of an image, but not its last")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.lookahead_real_size", *words])
    title = f"{asked.shape}, {asked.layers} layers, float32 where not quantized"
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="ssd-export-") as folder:
        model = write_checkpoint(
            Path(folder) / "model", asked.shape, "transformers", "fp32", num_layers=asked.layers
        )
        for weights in asked.weights.split(","):
            for cache in asked.caches.split(","):
                with opened(model, weights, cache, asked.threads) as generator:
                    for drawn in DRAWS:
                        names = ("fp32" if weights == "none" else weights, cache)
                        rows += rows_of(generator, names, drawn, asked.grid_rows, asked.rounds)
                found = {"tables": [table(title, COLUMNS, rows)]}
                write_measurement(asked.out, measurement(command, found, asked.note))
    slow = too_slow(rows)
    for line in slow:
        print(f"auto is slower than off by more than 3 %: {line}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
