"""Goals of the default policy on the demo model, and whether the rows of a sweep reach them.

G1  At a budget of 0.2 it keeps 98 % of the full cache's scene score, at 0.1 95 %.
G2  At the same budget it is above streaming-llm and h2o by more than the 95 % interval of the
difference, which is
    taken caption by caption over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ssd_export.metrics.intervals import Z95, Mean
from ssd_export.report.measurement import table
from ssd_export.sweep.spec import FULL, GOAL_BUDGETS, GOAL_POLICIES

DEFAULT, *RIVALS = GOAL_POLICIES[:3]
KEPT = {0.2: 0.98, 0.1: 0.95}
Row = dict[str, Any]
TITLE = f"Goals of the default policy, {DEFAULT}"
NOTE = (
    "± is half of a 95 % interval; differences are taken caption by caption over all seeds. A share"
    " is reached if the measured one is not below it, a difference if its whole interval is"
    " above 0."
)


def goal_table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """A line for each goal: what is asked, measured, and whether it is reached. None where nothing
    was generated with the full cache or the default policy."""
    cells = {(row["policy"], row["budget"]): row for row in rows if "ok" in row}
    full, mine = cells.get((FULL, 1.0)), [cells.get((DEFAULT, budget)) for budget in GOAL_BUDGETS]
    if full is None or not any(mine):
        return None
    lines = [_kept(own, full, budget) for own, budget in zip(mine, GOAL_BUDGETS, strict=True)]
    lines += [
        _above(own, cells.get((rival, budget)), rival, budget)
        for own, budget in zip(mine, GOAL_BUDGETS, strict=True)
        for rival in RIVALS
    ]
    return table(TITLE, ["goal", "measured", "captions", "reached"], lines, NOTE)


def goal_figures(rows: Sequence[Row]) -> dict[str, str]:
    """Measured figures of each goal, for running text: kept-0.2, above-h2o-0.1; none that was not
    measured.
    """
    found = goal_table(rows)
    names = [f"kept-{budget:g}" for budget in GOAL_BUDGETS] + [
        f"above-{rival}-{budget:g}" for budget in GOAL_BUDGETS for rival in RIVALS
    ]
    return (
        {
            name: line[1].split(" (")[0]
            for name, line in zip(names, found["rows"], strict=True)
            if line[1]
        }
        if found
        else {}
    )


def paired_cases(own: Row, other: Row, name: str = "ok") -> tuple[list[float], list[float]]:
    """The cases of the seeds that both have."""
    common = [seed for seed in own["seeds"] if seed in other["seeds"]]
    return _cases(own, name, common), _cases(other, name, common)


def _cases(row: Row, name: str, seeds: Sequence[int]) -> list[float]:
    each = len(row[name]) // len(row["seeds"])
    return [
        float(value)
        for seed in seeds
        for value in row[name][row["seeds"].index(seed) * each :][:each]
    ]


def ratio_of_means(values: Sequence[float], baseline: Sequence[float]) -> Mean:
    """The mean of values over that of the baseline; the error by the delta method over pairs
    (Cochran 1977, 6.4).
    """
    base = Mean.of(baseline).value
    if not base:
        return Mean(math.nan, math.nan, len(values))
    ratio = Mean.of(values).value / base
    rest = Mean.of([value - ratio * other for value, other in zip(values, baseline, strict=True)])
    return Mean(ratio, rest.standard_error / base, len(values))


def _kept(own: Row | None, full: Row, budget: float) -> list[str | None]:
    wanted = f"keeps {100 * KEPT[budget]:.0f} % of the full cache's score at {budget:g}"
    if own is None:
        return [wanted, None, None, None]
    cases = paired_cases(own, full)
    share = ratio_of_means(*cases)
    mine, theirs = (100 * Mean.of(values).value for values in cases)
    measured = (
        f"{100 * share.value:.1f} % ± {100 * share.half_width:.1f} ({mine:.1f} of {theirs:.1f})"
    )
    return [wanted, measured, str(len(cases[0])), _yes(share.value >= KEPT[budget])]


def _above(own: Row | None, other: Row | None, rival: str, budget: float) -> list[str | None]:
    wanted = f"above {rival} at {budget:g}"
    if own is None or other is None:
        return [wanted, None, None, None]
    cases = paired_cases(own, other)
    difference = Mean.of_differences(*cases)
    mine, theirs = (f"{row['image_slots_mean']:.1f}" for row in (own, other))
    measured = (
        f"{100 * difference.value:+.1f} ± {100 * Z95 * difference.standard_error:.1f} points"
        f" ({mine} and {theirs} slots)"
    )
    return [wanted, measured, str(len(cases[0])), _yes(difference.value > difference.half_width)]


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
