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

import numpy as np

from benchmarks.measured_process import answer_of
from benchmarks.precision_divergence import PRECISIONS, divergences, kl_text
from ssd_export.demo.scenes import CATEGORIES
from ssd_export.metrics.intervals import Mean
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, table, write_measurement

JSON = Path("docs/measurements/quantization.json")
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


def results_of(runs: dict[str, dict[str, Any]], kl: dict[str, np.ndarray]) -> dict[str, Any]:
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


def _row(name: str, run: dict[str, Any], base: dict[str, Any], kl: np.ndarray | None) -> list[str]:
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
        "-" if kl is None else kl_text(kl),
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
