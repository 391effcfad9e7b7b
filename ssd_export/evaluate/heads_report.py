"""Does it pay to know the heads? What every policy loses against the full cache, teacher-forced, scene by scene.

    python -m ssd_export.evaluate.heads_report [--scenes 64] [--num-prompts 0] [--out docs/measurements/heads.json]

A sweep (sweep.py) over true scenes whose captions training and calibration never saw. Every policy has as many slots on
average; what it loses is compared with what ssd-auto loses on the same scenes. With --num-prompts the scene score is
measured too. Interrupted, it goes on from its folder of cells.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ssd_export.cache.head_map import HeadMap, find_head_map
from ssd_export.errors import UserError
from ssd_export.evaluate.intervals import Mean
from ssd_export.evaluate.measurement import measurement, table, write_measurement
from ssd_export.evaluate.sweep import SweepResult, run_sweep
from ssd_export.evaluate.sweep_spec import FULL, SweepSpec
from ssd_export.export.exporter import model_folder
from ssd_export.model.checkpoint import open_checkpoint

BUDGETS = (0.1, 0.2)
AUTO, ROW = "ssd-auto", "ssd-row"
GROUPS = tuple(f"{AUTO}@groups={groups}" for groups in (1, 2, "unlimited"))
RANDOM = tuple(f"{ROW}@head-map=random:{seed}" for seed in range(3))
CONTROLS = (*RANDOM, f"{ROW}@head-map=swapped")
RIVALS = (ROW, "h2o@evict-every=24", "streaming-llm", "streaming-llm@num-sinks=4", "tova", "linear", "margin")
POLICIES = (AUTO, *GROUPS, *RIVALS, *CONTROLS)
Cells = dict[tuple[str, float], dict[str, Any]]


def report(result: SweepResult, head_map: HeadMap) -> dict[str, Any]:
    """Tables and figures for docs/heads.md; head_map: the one that ssd-auto and ssd-row stand on."""
    cells = {(cell["policy"], cell["budget"]): cell for cell in result.cells}
    full = Mean.of(cells[FULL, 1.0]["losses"])
    unit = f"Thousandths of a nat per image token, mean over {full.num_values} true scenes ± one standard error"
    paired = ["other policy", "0.1 less 0.1", "0.2 less 0.2", "0.1 less 0.2"]
    others = (*GROUPS, *RIVALS)
    tables = [
        table("What a policy loses", ["policy", *_columns(cells)], [[policy, *_row(cells, policy)] for policy in POLICIES],
              f"{unit}. Loss: teacher-forced, above the full cache's {1000 * full.value:.3f}; KL: from the full cache."),
        table("Loss under ssd-auto less loss under another policy", paired, _paired_rows(cells, "losses", AUTO, others),
              f"{unit} of the differences, in brackets their ratio; below 0 ssd-auto is better."),
        table("KL under ssd-auto less KL under another policy", paired, _paired_rows(cells, "kl", AUTO, others),
              f"{unit} of the differences, in brackets their ratio; below 0 ssd-auto is better."),
        table("ssd-row with the measured head types less ssd-row with others",
              ["head types", *(f"{what}, {budget}" for what in ("loss", "KL") for budget in BUDGETS)], _control_rows(cells),
              f"{unit} of the differences, in brackets their ratio; below 0 the measured types are better."),
    ]  # fmt: skip
    if result.skipped:
        reasons = [[name, reason] for name, reason in result.skipped.items()]
        tables.append(table("Not measured", ["policy and budget", "why"], reasons))
    kept = [_kept(cell) for cell in result.cells]
    return {"tables": tables, "figures": _figures(head_map), "settings": result.settings, "cells": kept}


def _figures(head_map: HeadMap) -> dict[str, str]:
    heads = head_map.num_layers * head_map.num_kv_heads
    stability = head_map.statistics.get("stability")
    return {
        "semantic_heads": f"{round(heads * head_map.semantic_share)} of {heads}",
        "threshold": f"{head_map.threshold:.3g}",
        "pictures": str(head_map.statistics.get("num_images", "not known")),
        "stability": "not known" if stability is None else f"{stability:.3f}",
    }


def _columns(cells: Cells) -> list[str]:
    names = ("slots", "loss", "KL", "score") if _drawn(cells) else ("slots", "loss", "KL")
    return [f"{name} at {budget}" for budget in BUDGETS for name in names]


def _drawn(cells: Cells) -> bool:
    return "ok" in cells[FULL, 1.0]


def _row(cells: Cells, policy: str) -> list[str | None]:
    row: list[str | None] = []
    for budget in BUDGETS:
        cell = cells.get((policy, budget))
        row += [cell and f"{cell['image_slots_mean']:.1f}", _less(cell, cells[FULL, 1.0], "losses"), _kl(cell)]
        row += [_score(cells, cell)] if _drawn(cells) else []
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


def _paired_rows(cells: Cells, what: str, own: str, others: tuple[str, ...]) -> list[list[str | None]]:
    pairs = ((0.1, 0.1), (0.2, 0.2), (0.1, 0.2))
    return [
        [other, *(_paired(cells.get((own, mine)), cells.get((other, theirs)), what) for mine, theirs in pairs)]
        for other in others
    ]  # fmt: skip


def _control_rows(cells: Cells) -> list[list[str | None]]:
    loss, kl = (_paired_rows(cells, what, ROW, CONTROLS) for what in ("losses", "kl"))
    return [[*by_loss[:3], *by_kl[1:3]] for by_loss, by_kl in zip(loss, kl, strict=True)]


def _paired(own: dict[str, Any] | None, other: dict[str, Any] | None, what: str) -> str | None:
    difference = _less(own, other, what)
    if own is None or other is None or difference is None:
        return None
    mean = Mean.of_differences(own[what], other[what])
    return difference + (f" ({mean.value / mean.standard_error:+.1f})" if mean.standard_error else "")


def _kept(cell: dict[str, Any]) -> dict[str, Any]:
    """The case-by-case numbers that everything above follows from."""
    numbers = {what: [round(value, 8) for value in cell[what]] for what in ("losses", "kl")}
    kept = {name: cell[name] for name in ("policy", "budget", "image_slots_mean", "ok") if name in cell}
    return kept | numbers


class TimeLeft:
    """A progress function that says on stderr how far it is and how long it will be, every 10 seconds."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said > 10 or done == total:
            self._said = now
            left = (now - self._began) * (total / done - 1)
            print(f"{stage}: {100 * done // total} %, {left:.0f} s left", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a folder with a checkpoint that draws its scenes")
    parser.add_argument("--head-map", help="default: the model's own")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=0, help="captions of the scene score; 0: no score (default)")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/heads.json"))
    parser.add_argument("--cells", type=Path, default=Path("build/heads"), help="where finished cells are kept")
    parser.add_argument("--note", default="", help="what to know about the circumstances")
    asked = parser.parse_args()
    spec = SweepSpec(
        asked.model, POLICIES, BUDGETS, num_prompts=asked.num_prompts, seeds=1, num_scenes=asked.scenes, batch=16, runner="ort",
        provider="cpu", cfg_scale=None, temperature=None, head_map=asked.head_map, out=asked.cells,
    )  # fmt: skip
    command = shlex.join(["python", "-m", "ssd_export.evaluate.heads_report", *sys.argv[1:]])
    try:
        checkpoint = open_checkpoint(model_folder(asked.model)[1])
        head_map = find_head_map(checkpoint.config, asked.head_map, checkpoint.fingerprint(), checkpoint.path)
        if head_map is None or not head_map.cost_options:
            raise UserError("there is nothing to compare without a head map with costs; run `ssd-export calibrate`")
        write_measurement(asked.out, measurement(command, report(run_sweep(spec, TimeLeft()), head_map), asked.note))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(asked.out)


if __name__ == "__main__":
    main()
