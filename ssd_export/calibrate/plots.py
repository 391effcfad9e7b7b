"""Images of a head map: all heads, where two of them look, and which grid columns are looked
at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ssd_export.config import Grid
from ssd_export.policy.head_map import HeadMap

# Two of the colors of Okabe and Ito, and cividis: the same to all kinds of color vision.
SPATIAL, SEMANTIC = "#0072B2", "#D55E00"
COLORS = "cividis"
STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot_paths(path: Path) -> list[Path]:
    """The files that belong to --plot FILE: the heat map itself, attention and columns beside
    it.
    """
    return [
        path,
        *(path.with_name(f"{path.stem}-{what}{path.suffix}") for what in ("attention", "columns")),
    ]


def heat_map(head_map: HeadMap, path: Path) -> None:
    """Layers x heads, the metric as color (and in figures where they fit), semantic heads marked,
    their share by layer.
    """
    metric = np.asarray(head_map.metric)  # [layers, heads]
    size = head_map.num_heads // head_map.num_kv_heads
    semantic = np.repeat(np.asarray(head_map.semantic()), size, axis=1)
    num_layers, num_heads = metric.shape
    with plt.rc_context(STYLE):
        width, height = max(6.5, 0.3 * num_heads + 3.5), max(3.6, 0.3 * num_layers + 1.6)
        figure, (heads, share) = plt.subplots(
            1,
            2,
            figsize=(width, height),
            sharey=True,
            layout="constrained",
            gridspec_kw={"width_ratios": [max(3, num_heads / 5), 1]},
        )
        image = heads.imshow(
            metric, cmap=COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        _mark_semantic(heads, metric, semantic)
        heads.set(xlabel="query head", ylabel="layer")
        heads.set_xticks(_ticks(num_heads)), heads.set_yticks(_ticks(num_layers))
        figure.suptitle(
            f"{round(head_map.semantic_share * semantic.size)} of {semantic.size} heads are"
            f" semantic ({_MARKED[_has_room(metric)]}):\nmore than {100 * head_map.threshold:.0f} %"
            " of their attention is outside their neighborhood",
            x=0.01,
            ha="left",
            fontsize=13,
        )
        bar = figure.colorbar(image, ax=(heads, share), pad=0.02)
        bar.set_label(f"share outside {head_map.neighborhood}".removesuffix(" unknown"))
        (
            bar.ax.axhline(head_map.threshold, color="white", linewidth=3),
            bar.ax.axhline(head_map.threshold, color=SEMANTIC, linewidth=1.5),
        )
        share.barh(np.arange(num_layers), 100 * semantic.mean(axis=1), color=SEMANTIC, height=0.8)
        share.set(xlim=(0, 100), xlabel="% semantic")
        _write(figure, path)


_MARKED = {True: "bold, outlined", False: "dot"}


def _has_room(metric: np.ndarray) -> bool:
    return metric.shape[1] <= 8 and metric.shape[0] <= 12


def _mark_semantic(axis: plt.Axes, metric: np.ndarray, semantic: np.ndarray) -> None:
    """A figure in every cell where there is room for it, semantic ones bold and outlined; else a
    dot in semantic ones.
    """
    ink = np.where(metric > 0.55, "black", "white")
    if not _has_room(metric):
        rows, columns = np.nonzero(semantic)
        axis.scatter(columns, rows, s=24, c=ink[rows, columns], linewidths=0)
        return
    for (row, column), value in np.ndenumerate(metric):
        weight = "bold" if semantic[row, column] else "normal"
        axis.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color=ink[row, column],
            weight=weight,
        )
        if semantic[row, column]:
            axis.add_patch(
                Rectangle(
                    (column - 0.46, row - 0.44),
                    0.92,
                    0.88,
                    fill=False,
                    edgecolor=SEMANTIC,
                    linewidth=2.5,
                )
            )


def attention_plot(
    head_map: HeadMap,
    image: np.ndarray,
    maps: np.ndarray,
    heads: Sequence[tuple[int, int]],
    queries: Sequence[int],
    prompt: str,
    path: Path,
) -> None:
    """Plots where chosen tokens of two heads look, over the grid and over the image.

    Args: image uint8 [height, width, 3]; maps float32 [2, queries, image tokens], heads[0] spatial
    and heads[1] semantic.
    """
    grid = head_map.grid
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 1 + len(queries), figsize=(3.1 * (1 + len(queries)), 7), layout="constrained"
        )
        for row, (layer, head) in enumerate(heads):
            color, kind = ((SPATIAL, "most spatial"), (SEMANTIC, "most semantic"))[row]
            axes[row, 0].imshow(image, extent=(0, grid.width, grid.height, 0))
            axes[row, 0].set_title(
                f"{kind}: layer {layer}, head {head}\n{100 * head_map.metric[layer][head]:.0f} %"
                " outside its neighborhood",
                color=color,
                loc="left",
            )
            for axis, query, attention in zip(axes[row, 1:], queries, maps[row], strict=True):
                _overlay(axis, image, attention, query, color, grid)
            for axis in axes[row]:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        figure.suptitle(
            f"“{prompt}” as generated, and what the outlined token attends to",
            fontsize=13,
            x=0.01,
            ha="left",
        )
        _write(figure, path)


def _overlay(
    axis: plt.Axes,
    image: np.ndarray,
    attention: np.ndarray,
    query: int,
    color: str,
    grid: Grid,
) -> None:
    extent = (0, grid.width, grid.height, 0)
    row, column = divmod(query, grid.width)
    gray = image.mean(axis=-1) / 255 * 0.45 + 0.55
    axis.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=extent)
    strength = np.sqrt(
        attention.reshape(grid.height, grid.width) / attention.max()
    )  # the root: 1 % of the peak is a tenth of its ink
    layer = np.empty((grid.height, grid.width, 4))
    layer[..., :3], layer[..., 3] = to_rgb(color), strength
    axis.imshow(layer, extent=extent, interpolation="nearest")
    for line in range(grid.height + 1):
        axis.axhline(line, color="white", linewidth=0.3)
    for line in range(grid.width + 1):
        axis.axvline(line, color="white", linewidth=0.3)
    axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2))
    axis.set(xlim=(0, grid.width), ylim=(grid.height, 0))
    axis.set_title(
        f"token in row {row}, column {column}\ngives one token up to {100 * attention.max():.0f} %",
        loc="left",
    )


def column_plot(head_map: HeadMap, path: Path) -> None:
    """Share of the attention on image tokens that each grid column gets, for spatial and for
    semantic heads.
    """
    shares = np.asarray(head_map.statistics["column_share"])  # [layers, heads, columns]
    size = head_map.num_heads // head_map.num_kv_heads
    semantic = np.repeat(np.asarray(head_map.semantic()), size, axis=1)
    width = head_map.grid.width
    column = np.arange(width)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
        for shift, kind, color, hatch in (
            (-0.21, False, SPATIAL, None),
            (0.21, True, SEMANTIC, "//"),
        ):
            chosen = shares[semantic == kind]
            if len(chosen):
                name = f"{'semantic' if kind else 'spatial'} heads ({len(chosen)})"
                axis.bar(
                    column + shift,
                    100 * chosen.mean(axis=0),
                    0.42,
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0,
                    label=name,
                )
        axis.hlines(100 / width, -0.6, width - 0.4, color="black", linewidth=1, linestyle="--")
        axis.text(width - 0.3, 100 / width, "even", va="center")
        axis.set(
            xlabel="grid column",
            ylabel="% of the attention on image tokens",
            xticks=column,
            xlim=(-0.7, width + 0.9),
        )
        axis.set_title("Attention by grid column", loc="left")
        axis.legend(
            frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=2
        )
        _write(figure, path)


def _ticks(count: int) -> np.ndarray:
    return np.arange(0, count, 1 if count <= 12 else 2)


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
