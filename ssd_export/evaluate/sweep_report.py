"""A sweep's cells as a JSON file, a Markdown table, a Pareto plot and a contact sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ssd_export.demo.scenes import CATEGORIES
from ssd_export.evaluate.intervals import Mean, Share
from ssd_export.evaluate.scene_score import draw_scenes, judge_picture
from ssd_export.evaluate.sheets import Entry, comparison_sheet
from ssd_export.evaluate.sweep import SweepResult
from ssd_export.evaluate.sweep_cells import pictures_of
from ssd_export.evaluate.sweep_spec import FULL, SHOWN, SweepSpec, cell_name
from ssd_export.runtime.pictures import write_file, write_png

NOT_MEASURED = "-"


def write_report(spec: SweepSpec, result: SweepResult) -> list[Path]:
    """Writes sweep.json, sweep.md, pareto.png and, where pictures were drawn, sheet.png into the sweep's folder; their paths."""
    rows = [summary(cell, result.cells[0]) for cell in result.cells]
    whole = {"settings": result.settings, "skipped": result.skipped, "rows": rows}
    paths = [spec.out / name for name in ("sweep.json", "sweep.md", "pareto.png")]
    write_file(paths[0], lambda file: file.write(json.dumps(whole, indent=1).encode()))
    write_file(paths[1], lambda file: file.write(markdown(whole).encode()))
    write_file(paths[2], lambda file: plot(rows, file))
    if spec.num_prompts:
        paths.append(spec.out / "sheet.png")
        write_png(paths[3], sheet(spec, rows), {})
    return paths


def summary(cell: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """One row of the table: every quantity with its uncertainty, differences to the full cache case by case."""
    kept = ("policy", "budget", "image_slots_mean", "prompt_slots", "cache_bytes_per_image", "image_share_of_full_cache",
            "tokens_dropped_per_image", "ms_per_token", "seconds_per_image", "notes", "categories")  # fmt: skip
    row = {name: cell[name] for name in kept if name in cell}
    if "ok" in cell:
        row["score"] = Share(sum(cell["ok"]), len(cell["ok"])).to_dict()
        row["score_above_full"] = Mean.of_differences(cell["ok"], full["ok"]).to_dict()
    if "losses" in cell:
        row["loss"] = Mean.of(cell["losses"]).to_dict()
        row["loss_above_full"] = Mean.of_differences(cell["losses"], full["losses"]).to_dict()
    for name in ("token_agreement", "kl", "psnr"):
        if name in cell:
            row[name] = Mean.of(cell[name]).to_dict()
    return row


def markdown(whole: dict[str, Any]) -> str:
    """The table, what it was measured with, and what could not be measured."""
    settings, rows = whole["settings"], whole["rows"]
    scored = settings["measure"] == "scene score"
    columns = _SCORED if scored else _AGREEMENT
    lines = [
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows), "",
        f"Model {settings['model']} ({settings['model_fingerprint'][:12]}), {settings['num_prompts']} prompts and "
        f"{settings['seeds']} seeds for each row, batches of {settings['batch']}, runner {settings['runner']} on "
        f"{settings['provider']}, {settings['machine']}, ssd-export {settings['tool_version']}. "
        + (_SCORED_NOTE if scored else _AGREEMENT_NOTE).format(**settings),
        *(f"\nNot measured: {name}: {reason}" for name, reason in whole["skipped"].items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


_SCORED_NOTE = (
    "Score: share of captions unseen in training whose picture the checker accepts, 95 % Wilson interval; "
    "difference to the full cache with its 95 % interval, caption by caption. Loss: teacher-forced, nats per image token of "
    "{num_scenes} true scenes of captions unseen in training, above the full cache, ± one standard error of the differences; KL: "
    "from the full cache on the same scenes, in nats per image token, ± one standard error."
)
_AGREEMENT_NOTE = (
    "Compared with the full cache on the same prompts and random numbers, ± one standard error; KL is teacher-forced, in nats "
    "per token of the guided distributions."
)


def _error(mean: dict[str, Any]) -> float:
    return math.nan if mean["standard_error"] is None else mean["standard_error"]


def _percent(share: dict[str, Any]) -> str:
    return f"{100 * share['share']:.1f}"


def _score(row: dict[str, Any]) -> str:
    if "score" not in row:
        return NOT_MEASURED
    score = row["score"]
    return f"{_percent(score)} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _score_difference(row: dict[str, Any]) -> str:
    if row["policy"] == FULL or "score" not in row:
        return NOT_MEASURED
    difference = row["score_above_full"]
    half = 1.96 * _error(difference)
    return f"{100 * difference['mean']:+.1f} ± {100 * half:.1f}"


def _loss(row: dict[str, Any]) -> str:
    mean = row["loss_above_full"]
    if row["policy"] == FULL:
        return f"0 (loss {row['loss']['mean']:.4f})"
    return f"{mean['mean']:+.4f} ± {_error(mean):.4f}"


def _mean(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
    def text(row: dict[str, Any]) -> str:
        if name not in row:
            return NOT_MEASURED
        return f"{row[name]['mean']:.{digits}f} ± {_error(row[name]):.{digits}f}"

    return text


def _category(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _percent(row["categories"][name]) if "categories" in row else NOT_MEASURED


def _drawn(row: dict[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if name in row else NOT_MEASURED


_Column = Callable[[dict[str, Any]], str]
_WHAT: dict[str, _Column] = {"policy": lambda row: row["policy"], "budget": lambda row: f"{row['budget']:g}"}
_COST: dict[str, _Column] = {
    "image slots": lambda row: f"{row['image_slots_mean']:.1f}",
    "cache bytes an image": lambda row: _drawn(row, "cache_bytes_per_image", ","),
    "ms a token": lambda row: _drawn(row, "ms_per_token", ".3f"),
}
_SCORED = {
    **_WHAT, "score %": _score, **{name: _category(name) for name in CATEGORIES}, "score against full": _score_difference,
    "loss above full": _loss, "KL": _mean("kl", 5), **_COST,
}  # fmt: skip
_AGREEMENT = {
    **_WHAT, "equal tokens": _mean("token_agreement", 3), "KL": _mean("kl", 5), "PSNR dB": _mean("psnr", 1), **_COST,
}  # fmt: skip


def plot(rows: list[dict[str, Any]], file: BinaryIO) -> None:
    """Pareto plot: quality over the image slots of the average head, one line for each policy, with error bars."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(panel.measured in row for row in rows)] or [_KL]
    figure = Figure(figsize=(5.5 * len(panels), 4.6), layout="constrained")
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != FULL))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for policy in policies:
            points = sorted((row["image_slots_mean"], *panel.point(row)) for row in rows
                            if row["policy"] == policy and panel.measured in row)  # fmt: skip
            if points:
                x, y, below, above = zip(*points, strict=True)
                axes.errorbar(x, y, (below, above), label=policy, marker="o", capsize=3, linewidth=1.5, markersize=4)
        if panel.measured == "score":
            axes.axhline(panel.point(rows[0])[0], color="black", linestyle="--", linewidth=1, label="full cache")
        axes.set(title=panel.title, xlabel="image slots of the average head (of 576)")
        if panel.logarithmic:
            axes.set_yscale("symlog", linthresh=1e-3)
        axes.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(fontsize=8)
    figure.savefig(file, format="png", dpi=120)


_Point = Callable[[dict[str, Any]], tuple[float, float, float]]


def _score_point(row: dict[str, Any]) -> tuple[float, float, float]:
    score = row["score"]
    return 100 * score["share"], 100 * (score["share"] - score["low"]), 100 * (score["high"] - score["share"])


def _of(name: str) -> _Point:
    def point(row: dict[str, Any]) -> tuple[float, float, float]:
        error = _error(row[name])
        return row[name]["mean"], error, error

    return point


@dataclass(frozen=True)
class _Panel:
    """point: a row's value with its error down and up; measured: the part of a row that it needs."""

    title: str
    measured: str
    point: _Point
    logarithmic: bool


_KL = _Panel("teacher-forced KL to the full cache", "kl", _of("kl"), True)
_PANELS = (
    _Panel("scene score, % (95 % interval)", "score", _score_point, False),
    _Panel("teacher-forced loss above the full cache", "loss_above_full", _of("loss_above_full"), True),
    _Panel("PSNR to the full cache's picture, dB", "psnr", _of("psnr"), False),
    _KL,
)


def sheet(spec: SweepSpec, rows: list[dict[str, Any]]) -> Image.Image:
    """The first pictures of seed 0 of every cell, the same prompts above each other; wrong ones framed in red."""
    captions = [scene.caption for scene in draw_scenes(min(SHOWN, spec.num_prompts), 0)]
    lines = []
    for row in (row for row in rows if "ms_per_token" in row):
        with Image.open(spec.out / "cells" / f"{cell_name(row['policy'], row['budget'])}.png") as strip:
            images = list(pictures_of(strip.convert("RGB")))
        label = f"{row['policy']} {row['budget']:g}" + (f" {_percent(row['score'])} %" if "score" in row else "")
        wrong = [_wrong(image, caption) if "score" in row else "" for image, caption in zip(images, captions)]
        lines.append((label, [Entry(*entry) for entry in zip(images, captions, wrong)]))
    return comparison_sheet(captions, lines)


def _wrong(image: Image.Image, caption: str) -> str:
    return "; ".join(judge_picture(image, caption).reasons)
