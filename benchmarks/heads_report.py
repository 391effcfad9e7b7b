"""Does it pay to know the heads? What every policy loses against the full cache, teacher-forced,
scene by scene.

    python -m benchmarks.heads_report [--scenes 64] [--random 5] [--num-prompts 0]

A sweep (sweep.py) over true scenes whose captions training and calibration never saw. Every policy
has as many slots on average; what it loses is compared with what ssd-auto loses on the same scenes.
ssd-row is compared with head types permuted at random, each permutation by itself and scene by
scene the mean of all, and with types swapped. With --num-prompts the scene score is measured too.
Interrupted, it goes on from its folder of cells.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.metrics.intervals import Mean
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.find import model_folder
from ssd_export.policy.costs import predicted_error
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.sweep.spec import FULL, SweepSpec
from ssd_export.sweep.sweep import SweepResult, run_sweep, settle

BUDGETS = (0.1, 0.2)
NUM_PREDICTED = 200  # permutations whose error is predicted, which takes a second
AUTO, ROW = "ssd-auto", "ssd-row"
GROUPS = tuple(f"{AUTO}@groups={groups}" for groups in (1, 3, "unlimited"))
SWAPPED = f"{ROW}@head-map=swapped"
RIVALS = (
    ROW,
    "h2o@evict-every=24",
    "streaming-llm",
    "streaming-llm@num-sinks=4",
    "linear",
    "margin",
)
Cells = dict[tuple[str, float], dict[str, Any]]


def permutations(num_random: int) -> tuple[str, ...]:
    """ssd-row with head types permuted at random."""
    return tuple(f"{ROW}@head-map=random:{seed}" for seed in range(num_random))


def mean_of(num_random: int) -> str:
    """The name of the mean over all permutations."""
    return f"{ROW}@head-map=random, mean of {num_random}"


def policies(num_random: int) -> tuple[str, ...]:
    """Names of the policies to measure."""
    return (AUTO, *GROUPS, *RIVALS, SWAPPED, *permutations(num_random))


def report(
    result: SweepResult, head_map: HeadMap, config: ModelConfig, num_random: int
) -> dict[str, Any]:
    """Tables and figures for docs/heads.md; head_map: the one that ssd-auto and ssd-row stand on,
    with costs.
    """
    cells = {(cell["policy"], cell["budget"]): cell for cell in result.cells}
    cells |= _means(cells, num_random)
    controls = (mean_of(num_random), SWAPPED, *permutations(num_random))
    full = Mean.of(cells[FULL, 1.0]["losses"])
    unit = (
        f"Thousandths of a nat per image token, mean over {full.num_values} true scenes ± one"
        " standard error"
    )
    paired = ["other policy", "0.1 less 0.1", "0.2 less 0.2", "0.1 less 0.2"]
    others = (*GROUPS, *RIVALS)
    tables = [
        table(
            "What a policy loses",
            ["policy", *_columns(cells)],
            [[policy, *_row(cells, policy)] for policy in (AUTO, *GROUPS, *RIVALS, *controls)],
            f"{unit}. Loss: teacher-forced, above the full cache's {1000 * full.value:.3f}; KL:"
            " from the full cache.",
        ),
        table(
            "Loss under ssd-auto less loss under another policy",
            paired,
            _paired_rows(cells, "losses", AUTO, others),
            f"{unit} of the differences, in brackets their ratio; below 0 ssd-auto is better.",
        ),
        table(
            "KL under ssd-auto less KL under another policy",
            paired,
            _paired_rows(cells, "kl", AUTO, others),
            f"{unit} of the differences, in brackets their ratio; below 0 ssd-auto is better.",
        ),
        table(
            "ssd-row with the measured head types less ssd-row with others",
            ["head types", *(f"{what}, {budget}" for what in ("loss", "KL") for budget in BUDGETS)],
            _control_rows(cells, controls),
            f"{unit} of the differences, in brackets their ratio; below 0 the measured types are"
            " better.",
        ),
        table(
            "Error that the head map predicts for ssd-row",
            [
                "budget",
                "measured types",
                "swapped",
                f"mean of {NUM_PREDICTED} permutations ± their standard deviation",
                "permutations predicted better",
            ],
            [_predicted_row(head_map, config, budget) for budget in BUDGETS],
            "Thousandths of a nat per image token, from the costs of the calibration images.",
        ),
    ]
    if result.skipped:
        reasons = [[name, reason] for name, reason in result.skipped.items()]
        tables.append(table("Not measured", ["policy and budget", "why"], reasons))
    kept = [_kept(cell) for cell in result.cells]
    return {
        "tables": tables,
        "figures": _figures(head_map),
        "settings": result.settings,
        "cells": kept,
    }


def _predicted_row(head_map: HeadMap, config: ModelConfig, budget: float) -> list[str]:
    def error(types: HeadMap) -> float:
        return 1000 * predicted_error(
            make_policy(ROW, config, budget=budget, head_map=types), head_map
        )

    own, permuted = error(head_map), [error(head_map.random(seed)) for seed in range(NUM_PREDICTED)]
    better = sum(value < own for value in permuted)
    return [
        f"{budget}",
        f"{own:.3f}",
        f"{error(head_map.swapped()):.3f}",
        f"{fmean(permuted):.3f} ± {stdev(permuted):.3f}",
        f"{better} of {NUM_PREDICTED}",
    ]


def _figures(head_map: HeadMap) -> dict[str, str]:
    heads = head_map.num_layers * head_map.num_kv_heads
    stability = head_map.statistics.get("stability")
    return {
        "semantic_heads": f"{round(heads * head_map.semantic_share)} of {heads}",
        "threshold": f"{head_map.threshold:.3g}",
        "images": str(head_map.statistics.get("num_images", "not known")),
        "stability": "not known" if stability is None else f"{stability:.3f}",
    }


def _columns(cells: Cells) -> list[str]:
    names = ("slots", "loss", "KL", "score") if _scored(cells) else ("slots", "loss", "KL")
    return [f"{name} at {budget}" for budget in BUDGETS for name in names]


def _scored(cells: Cells) -> bool:
    return "ok" in cells[FULL, 1.0]


def _row(cells: Cells, policy: str) -> list[str | None]:
    row: list[str | None] = []
    for budget in BUDGETS:
        cell = cells.get((policy, budget))
        row += [
            cell and f"{cell['image_slots_mean']:.1f}",
            _less(cell, cells[FULL, 1.0], "losses"),
            _kl(cell),
        ]
        row += [_score(cells, cell)] if _scored(cells) else []
    return row


def _kl(cell: dict[str, Any] | None) -> str | None:
    if cell is None:
        return None
    mean = Mean.of(cell["kl"])
    return f"{1000 * mean.value:.3f} ± {1000 * mean.standard_error:.3f}"


def _less(own: dict[str, Any] | None, other: dict[str, Any] | None, what: str) -> str | None:
    """The mean difference, scene by scene."""
    if own is None or other is None:
        return None
    mean = Mean.of_differences(own[what], other[what])
    return f"{1000 * mean.value:+.3f} ± {1000 * mean.standard_error:.3f}"


def _score(cells: Cells, cell: dict[str, Any] | None) -> str | None:
    if cell is None or "ok" not in cell:
        return None
    difference = Mean.of_differences(cell["ok"], cells[FULL, 1.0]["ok"])
    own = 100 * Mean.of(cell["ok"]).value
    return f"{own:.1f} % ({100 * difference.value:+.1f} ± {100 * difference.half_width:.1f})"


def _paired_rows(
    cells: Cells, what: str, own: str, others: tuple[str, ...]
) -> list[list[str | None]]:
    pairs = ((0.1, 0.1), (0.2, 0.2), (0.1, 0.2))
    return [
        [
            other,
            *(
                _paired(cells.get((own, mine)), cells.get((other, theirs)), what)
                for mine, theirs in pairs
            ),
        ]
        for other in others
    ]


def _means(cells: Cells, num_random: int) -> Cells:
    """Average loss of the permutations, scene by scene, where all of them were measured."""
    means: Cells = {}
    for budget in BUDGETS:
        permuted = [
            cells[policy, budget]
            for policy in permutations(num_random)
            if (policy, budget) in cells
        ]
        if permuted and len(permuted) == num_random:
            mean: dict[str, Any] = {
                "image_slots_mean": fmean(cell["image_slots_mean"] for cell in permuted)
            }
            for name in ("losses", "kl", "ok"):
                if name in permuted[0]:
                    mean[name] = [
                        fmean(values)
                        for values in zip(*(cell[name] for cell in permuted), strict=True)
                    ]
            means[mean_of(num_random), budget] = mean
    return means


def _control_rows(cells: Cells, controls: tuple[str, ...]) -> list[list[str | None]]:
    loss, kl = (_paired_rows(cells, what, ROW, controls) for what in ("losses", "kl"))
    return [[*by_loss[:3], *by_kl[1:3]] for by_loss, by_kl in zip(loss, kl, strict=True)]


def _paired(own: dict[str, Any] | None, other: dict[str, Any] | None, what: str) -> str | None:
    difference = _less(own, other, what)
    if own is None or other is None or difference is None:
        return None
    mean = Mean.of_differences(own[what], other[what])
    return difference + (
        f" ({mean.value / mean.standard_error:+.1f})" if mean.standard_error else ""
    )


def _kept(cell: dict[str, Any]) -> dict[str, Any]:
    """The case-by-case numbers that everything above follows from."""
    numbers = {what: [round(value, 8) for value in cell[what]] for what in ("losses", "kl")}
    kept = {
        name: cell[name] for name in ("policy", "budget", "image_slots_mean", "ok") if name in cell
    }
    return kept | numbers


class TimeLeft:
    """A progress function that says on stderr how far it is and how long it will be, every 10
    seconds.
    """

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Prints stage, share and time left, at most every ten seconds and at the end."""
        now = time.monotonic()
        if now - self._said > 10 or done == total:
            self._said = now
            left = f", {(now - self._began) * (total / done - 1):.0f} s left" if done else ""
            print(f"{stage}: {100 * done // total} %{left}", file=sys.stderr)


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, or a folder with a checkpoint that generates its scenes",
    )
    parser.add_argument("--head-map", help="default: the model's own")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument(
        "--random",
        type=int,
        default=5,
        help="random permutations of the head types that ssd-row is compared with",
    )
    parser.add_argument(
        "--num-prompts",
        type=int,
        default=0,
        help="captions of the scene score; 0: no score (default)",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/heads.json"))
    parser.add_argument(
        "--cells", type=Path, default=Path("build/heads"), help="where finished cells are kept"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes side by side; default: one for each core, as far as memory goes",
    )
    parser.add_argument("--note", default="", help="what to know about the circumstances")
    asked = parser.parse_args()
    if asked.random < 1:
        parser.error(f"--random {asked.random} compares with nothing; use 5")
    spec = SweepSpec(
        asked.model,
        policies(asked.random),
        BUDGETS,
        num_prompts=asked.num_prompts,
        seeds=1,
        num_scenes=asked.scenes,
        batch=None,
        runner="ort",
        provider="cpu",
        cfg_scale=None,
        temperature=None,
        head_map=asked.head_map,
        out=asked.cells,
        jobs=asked.jobs,
    )
    command = shlex.join(["python", "-m", "benchmarks.heads_report", *sys.argv[1:]])
    try:
        checkpoint = open_checkpoint(model_folder(asked.model)[1])
        head_map = checkpoint.head_map(asked.head_map)
        if head_map is None or not head_map.cost_options:
            raise UserError(
                "there is nothing to compare without a head map with costs; run `ssd-export"
                " calibrate`"
            )
        result = run_sweep(settle(spec), TimeLeft())
        if result.failed:
            name, reason = next(iter(result.failed.items()))
            raise UserError(
                f"{len(result.failed)} parts failed, {name} first: {reason}; run it again, what is"
                " finished stays"
            )
        whole = report(result, head_map, checkpoint.config, asked.random)
        write_measurement(asked.out, measurement(command, whole, asked.note))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(asked.out)


if __name__ == "__main__":
    main()
