"""The Pareto plot of a sweep: quality over the slots of the average head, every line with its name
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from ssd_export.sweep.spec import FULL, GOAL_POLICIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8c564b",
    "#7f7f00",
    "#56b4e9",
    "#e69f00",
)  # told apart by most eyes
CHANGED = "#777777"  # of variants, which are controls
MARKERS = "osD^vPX*<>hp"
LINES = ((0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
LABEL_HEIGHT = 0.04  # of the axes
Row = dict[str, Any]
Point = tuple[float, float, float]  # a value, and its error down and up


def plot(rows: Sequence[Row], file: BinaryIO) -> None:
    """Writes a PNG with a panel for each quality that was measured."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(panel.measured in row for row in rows)]
    panels = [panel for panel in panels if panel is not _KL or _LOSS not in panels] or [_KL]
    figure = Figure(figsize=(9, 5.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        _draw(axes, panel, rows)
    figure.savefig(file, format="png", dpi=120)


def _draw(axes: Axes, panel: _Panel, rows: Sequence[Row]) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != FULL))
    num_tokens = rows[0]["image_slots_mean"]  # the full cache holds every image token
    axes.set(title=panel.title, xlabel=f"image slots of the average head, of {num_tokens:.0f}")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if panel.logarithmic:
        axes.set_yscale("symlog", linthresh=1e-4)
    ends, low = [], _far_below(panel, rows)
    for place, policy in enumerate(policies):
        own = [
            row
            for row in rows
            if row["policy"] == policy and policy not in low and panel.measured in row
        ]
        points = [(row["image_slots_mean"], *panel.point(row)) for row in own]
        if points:
            x, y, below, above = zip(*sorted(points), strict=True)
            # error bars beside each other
            x = tuple(slots * (1 + 0.008 * (place - len(policies) / 2)) for slots in x)
            look = _look(policy, policies)
            axes.plot(x, y, **look)
            axes.errorbar(
                x, y, (below, above), fmt="none", ecolor=look["color"], elinewidth=0.7, alpha=0.45
            )
            ends.append((policy, x[0], y[0], look["color"]))
    if panel.measured == "score" and "score" in rows[0]:
        axes.axhline(panel.point(rows[0])[0], color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "full cache",
            (0, panel.point(rows[0])[0]),
            (4, 3),
            ("axes fraction", "data"),
            "offset points",
            fontsize=8.5,
        )
    if low:
        axes.annotate(
            f"not shown, below half of the full cache's score: {', '.join(low)}",
            (0.01, 0.02),
            xycoords="axes fraction",
            fontsize=8.5,
        )
    _scale(axes, rows)
    _name(axes, ends)


def _far_below(panel: _Panel, rows: Sequence[Row]) -> list[str]:
    """Policies whose best score is below half of the full cache's: with them the others would be
    one line.
    """
    if panel.measured != "score" or "score" not in rows[0]:
        return []
    best: dict[str, float] = {}
    for row in rows:
        if "score" in row:
            best[row["policy"]] = max(best.get(row["policy"], 0.0), row["score"]["share"])
    return [policy for policy, share in best.items() if share < rows[0]["score"]["share"] / 2]


def _look(policy: str, policies: Sequence[str]) -> dict[str, Any]:
    """Color for a policy, gray dashes for a variant; the default policy is the thick line in
    black.
    """
    changed = [name for name in policies if "@" in name]
    plain = [name for name in policies if name not in changed and name != GOAL_POLICIES[0]]
    marker = MARKERS[policies.index(policy) % len(MARKERS)]
    if policy in changed:
        line = LINES[changed.index(policy) % len(LINES)]
        return {
            "color": CHANGED,
            "marker": marker,
            "markersize": 3.5,
            "linewidth": 1,
            "linestyle": line,
            "alpha": 0.9,
        }
    if policy == GOAL_POLICIES[0]:
        return {"color": "black", "marker": marker, "markersize": 5, "linewidth": 2.4, "zorder": 5}
    return {
        "color": COLORS[plain.index(policy) % len(COLORS)],
        "marker": marker,
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def _scale(axes: Axes, rows: Sequence[Row]) -> None:
    """Ticks at the slots that were measured, and room for the names on the left."""
    slots = sorted(row["image_slots_mean"] for row in rows if row["policy"] != FULL) or [1.0]
    ticks = [slots[0]]
    for value in slots:
        if value > 1.1 * ticks[-1]:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(ticks[0] * (slots[-1] / ticks[0] + 1e-9) ** -0.45 / 1.15, slots[-1] * 1.1)


def _name(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """The names in a column left of the lines' first points, in their order and never over each
    other.
    """
    if not ends:
        return
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    axes.get_ylim()
    axes.autoscale(enable=False, axis="y")
    placed = sorted(
        ((*to_axes((x, y)).tolist(), policy, color, (x, y)) for policy, x, y, color in ends),
        key=lambda one: one[1],
    )
    heights = spread([height for _, height, *_ in placed], LABEL_HEIGHT)
    column = min(left for left, *_ in placed) - 0.05
    for height, (_, _, policy, color, point) in zip(heights, placed, strict=True):
        axes.annotate(
            policy,
            point,
            (column, height),
            "data",
            "axes fraction",
            color=color,
            ha="right",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={
                "arrowstyle": "-",
                "relpos": (1, 0.5),
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Heights in ascending order, moved as little as it takes for neighbors to be `least` apart,
    within 0 and 1.
    """
    least = min(least, 1 / max(1, len(heights)))
    clusters: list[
        tuple[float, int]
    ] = []  # (mean of the heights less their places in the cluster, how many)
    for height in heights:
        base, count = height, 1
        while clusters and clusters[-1][0] + least * clusters[-1][1] > base:
            before, number = clusters.pop()
            base = (before * number + (base - least * number) * count) / (number + count)
            count += number
        clusters.append((base, count))
    moved = [base + least * place for base, count in clusters for place in range(count)]
    top, bottom = 1 - least / 2, least / 2
    for index in reversed(range(len(moved))):
        moved[index], top = min(moved[index], top), min(moved[index], top) - least
    for index, height in enumerate(moved):
        moved[index], bottom = max(height, bottom), max(height, bottom) + least
    return moved


def _score_point(row: Row) -> Point:
    share, low, high = (100 * row["score"][name] for name in ("share", "low", "high"))
    return (
        share,
        max(0.0, share - low),
        max(0.0, high - share),
    )  # at 100 % rounding can put the share above its end


def _of(name: str) -> Callable[[Row], Point]:
    def point(row: Row) -> Point:
        error = row[name]["standard_error"]
        error = math.nan if error is None else error
        return row[name]["mean"], error, error

    return point


@dataclass(frozen=True)
class _Panel:
    """One panel of the plot. point: a row's value with its error down and up; measured: the part of
    a row that it needs.
    """

    title: str
    measured: str
    point: Callable[[Row], Point]
    logarithmic: bool


_LOSS = _Panel(
    "teacher-forced loss above the full cache (± one standard error)",
    "loss_above_full",
    _of("loss_above_full"),
    True,
)
_KL = _Panel("teacher-forced KL to the full cache (± one standard error)", "kl", _of("kl"), True)
_PANELS = (
    _Panel("scene score, % (95 % interval)", "score", _score_point, False),
    _LOSS,
    _Panel("PSNR to the full cache's image, dB", "psnr", _of("psnr"), False),
    _KL,
)
