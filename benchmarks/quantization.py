"""Scores the demo model at every precision and writes docs/measurements/quantization.json.

    python -m benchmarks.quantization [--num-prompts 200] [--model demo]

One `ssd-export eval` for each precision, the same captions and random numbers in all: differences
are caption by caption. The bounds are of the difference itself; the interval says what another set
of captions could have given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured_process import answer_of
from benchmarks.precision_divergence import divergence
from ssd_export.demo.scenes import CATEGORIES
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.metrics.intervals import Mean
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.sweep.spec import SCENE_SEED

JSON = Path("docs/measurements/quantization.json")
PRECISIONS = {
    "fp32": "",
    "int8": "--weights int8",
    "int8, head kept": "--weights int8 --head-weights none",
    "int4": "--weights int4",
    "int4, head kept": "--weights int4 --head-weights none",
    "int4, head too": "--weights int4 --head-weights int4",
    "kv8": "--kv-dtype int8",
}
# points of the scene score below fp32
BOUNDS = {
    name: {"int8": 1.0, "int4": 4.0, "kv8": 1.0}[name.split(",")[0]]
    for name in PRECISIONS
    if name != "fp32"
}
COLUMNS = [
    "precision",
    "score (95 % interval)",
    "points from fp32 (95 %)",
    "bound",
    "images judged otherwise",
    "KL, thousandths of a nat a token (95 %)",
    *CATEGORIES,
    "cache bytes an image",
    "ms a token",
]


def evaluate(model: str, num_prompts: int, options: str) -> dict[str, Any]:
    """The JSON that `ssd-export eval` prints. Raises: SystemExit where it fails."""
    return answer_of(
        ["eval", "--model", model, "--num-prompts", str(num_prompts), *options.split(), "--json"]
    )


def divergences(model: str, num_scenes: int) -> dict[str, Mean]:
    """KL from fp32's sampling distribution for every other precision (precision_divergence.py)."""
    scenes = draw_scenes(num_scenes, SCENE_SEED)
    found = {}
    with temporary_bundle(PolicyChoice(model)) as reference:
        for name, options in PRECISIONS.items():
            if options:
                with temporary_bundle(PolicyChoice(model, **choice_of(options))) as bundle:
                    found[name] = Mean.of(divergence(reference, bundle, scenes).tolist())
    return found


def choice_of(options: str) -> dict[str, Any]:
    """Fields of a PolicyChoice of the command line's options."""
    words = options.split()
    return {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }


def results_of(runs: dict[str, dict[str, Any]], kl: dict[str, Mean]) -> dict[str, Any]:
    """The table, the scores by name, and the runs without their images."""
    base = runs["fp32"]
    rows = [_row(name, run, base, kl.get(name)) for name, run in runs.items()]
    title = (
        f"Scene score of {base['model']} by precision, {base['policy']} at {base['budget']:g},"
        f" {base['num_prompts']} unseen captions"
    )
    note = (
        f"One seed; 1 point is {base['num_prompts'] / 100:g} images. Weight-only quantization of"
        " matrices; everything else stays float32. KL from fp32 of what a token is sampled from,"
        " given the tokens of true scenes. Bound: points below fp32 that are"
        " allowed; it is held to the difference, not to its interval."
    )
    kept = {
        name: {key: value for key, value in run.items() if key != "images"}
        for name, run in runs.items()
    }
    figures = {name: f"{100 * run['overall']['share']:.1f} %" for name, run in runs.items()}
    return {"tables": [table(title, COLUMNS, rows, note)], "figures": figures, "runs": kept}


def _row(name: str, run: dict[str, Any], base: dict[str, Any], kl: Mean | None) -> list[str]:
    overall, verdicts, wanted = run["overall"], _verdicts(run), _verdicts(base)
    difference = Mean.of_differences(verdicts, wanted)
    points = (
        "-" if run is base else f"{100 * difference.value:+.1f} ± {100 * difference.half_width:.1f}"
    )
    bound = BOUNDS.get(name)
    held = (
        "-"
        if bound is None
        else f"{bound:g}: {'holds' if 100 * difference.value >= -bound else 'missed'}"
    )
    changed = (
        "-" if run is base else str(sum(a != b for a, b in zip(verdicts, wanted, strict=True)))
    )
    return [
        f"`{PRECISIONS[name]}`" if PRECISIONS[name] else name,
        (
            f"{100 * overall['share']:.1f} % ({100 * overall['low']:.1f} to"
            f" {100 * overall['high']:.1f})"
        ),
        points,
        held,
        changed,
        "-" if kl is None else f"{1e3 * kl.value:.3f} ± {1e3 * kl.half_width:.3f}",
        *(
            f"{run['categories'][category]['hits']} / {run['categories'][category]['total']}"
            for category in CATEGORIES
        ),
        f"{run['cache_bytes_per_image']:,}",
        f"{run['ms_per_token']:.2f}",
    ]


def _verdicts(run: dict[str, Any]) -> list[float]:
    return [float(image["ok"]) for image in run["images"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-scenes", type=int, default=64)
    parser.add_argument("--json", type=Path, default=JSON)
    asked = parser.parse_args(arguments)
    note = busy_note()
    runs = {
        name: evaluate(asked.model, asked.num_prompts, options)
        for name, options in PRECISIONS.items()
    }
    results = results_of(runs, divergences(asked.model, asked.num_scenes))
    for row in [COLUMNS, *results["tables"][0]["rows"]]:
        print(" | ".join(row))
    command = (
        f"python -m benchmarks.quantization --num-prompts {asked.num_prompts}"
        f" --num-scenes {asked.num_scenes}"
    )
    write_measurement(asked.json, measurement(command, results, note))


if __name__ == "__main__":
    main()
