"""A sweep's cells as a JSON file, Markdown tables, a Pareto plot and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ssd_export.demo.scenes import CATEGORIES
from ssd_export.errors import UserError
from ssd_export.files import write_file
from ssd_export.metrics.intervals import Z95, Mean, Share
from ssd_export.metrics.scene_score import draw_scenes, judge_image
from ssd_export.report.contact_sheet import Entry, comparison_sheet
from ssd_export.report.measurement import markdown_table, table
from ssd_export.runtime.images import write_png
from ssd_export.sweep.acceptance import goal_table, paired_cases
from ssd_export.sweep.cells import images_of, read_strip
from ssd_export.sweep.plot import plot
from ssd_export.sweep.spec import FULL, GOAL_BUDGETS, SHOWN, Part, SweepSpec
from ssd_export.sweep.sweep import SCORE, SweepResult

NOT_MEASURED = "-"
THOUSANDTHS = 1000
MAX_SHEET_ROWS = 24  # a sheet of more keeps to the budgets of the goals
KEPT = (
    "policy",
    "budget",
    "seeds",
    "image_slots_mean",
    "prompt_slots",
    "cache_bytes_per_image",
    "image_share_of_full_cache",
    "tokens_evicted_per_image",
    "ms_per_token",
    "cpu_ms_per_token",
    "seconds_per_image",
    "jobs",
    "notes",
    "lookahead",
)
LOOKAHEAD = (
    "budget",
    "policy",
    "lookahead",
    "images",
    "same tokens",
    "passes",
    "tokens a pass",
    "ms a token",
    "CPU ms a token",
    "times faster",
)
LOOKAHEAD_NOTE = (
    "One image at a time, in turns with single steps (off): decode passes of an image, images with"
    " the tokens of single steps, time of the decode steps by the clock and of all threads; times"
    " faster: by the CPU's time."
)
Row = dict[str, Any]


def write_report(spec: SweepSpec, result: SweepResult) -> list[Path]:
    """Writes sweep.json, sweep.md, pareto.png and, where images were generated, sheet.png into the
    sweep's folder; their paths.

    Raises: UserError where nothing is there of the full cache, with which everything is compared.
    """
    if not result.cells or result.cells[0]["policy"] != FULL:
        raise UserError(
            f"{spec.out} holds nothing yet of the full cache, with which everything is compared;"
            " run the sweep again"
        )
    known = tuple(result.settings.get("categories", CATEGORIES))
    scenes = (
        {seed: draw_scenes(spec.num_prompts, seed, categories=known) for seed in range(spec.seeds)}
        if spec.num_prompts
        else {}
    )
    categories = {seed: [scene.category for scene in drawn] for seed, drawn in scenes.items()}
    rows = [summary(cell, result.cells[0], categories) for cell in result.cells]
    whole = {
        "settings": result.settings,
        "skipped": result.skipped,
        "failed": result.failed,
        "rows": rows,
    }
    paths = [spec.out / name for name in ("sweep.json", "sweep.md", "pareto.png")]
    write_file(paths[0], lambda file: file.write(json.dumps(whole, indent=1).encode()))
    write_file(paths[1], lambda file: file.write(markdown(whole).encode()))
    write_file(paths[2], lambda file: plot(rows, file))
    if any(0 in row.get("seeds", ()) for row in rows):
        paths.append(spec.out / "sheet.png")
        write_png(paths[3], sheet(spec, rows, known), {})
    return paths


def summary(cell: dict[str, Any], full: dict[str, Any], categories: dict[int, list[str]]) -> Row:
    """One row of the table: every quantity with its uncertainty, differences to the full cache case
    by case.

    Args: categories: of the captions of each seed.
    """
    row = {name: cell[name] for name in KEPT if name in cell}
    if "ok" in cell:
        row["ok"] = "".join(map(str, cell["ok"]))  # what everything else about images follows from
        row["score"] = Share(sum(cell["ok"]), len(cell["ok"])).to_dict()
        row["categories"] = _by_category(cell, categories)
        if "ok" in full:
            row["score_above_full"] = Mean.of_differences(*paired_cases(cell, full)).to_dict()
    if "losses" in cell:
        row["loss"] = Mean.of(cell["losses"]).to_dict()
        if "losses" in full:
            row["loss_above_full"] = Mean.of_differences(cell["losses"], full["losses"]).to_dict()
    for name in ("token_agreement", "kl", "psnr"):
        if name in cell:
            row[name] = Mean.of(cell[name]).to_dict()
    return row


def _by_category(cell: dict[str, Any], categories: dict[int, list[str]]) -> dict[str, Any]:
    of_cases = [name for seed in cell["seeds"] for name in categories[seed]]
    oks = {
        name: [ok for ok, own in zip(cell["ok"], of_cases, strict=True) if own == name]
        for name in CATEGORIES
        if name in of_cases
    }
    return {name: Share(sum(flags), len(flags)).to_dict() for name, flags in oks.items()}


def markdown(whole: dict[str, Any]) -> str:
    """The tables, what they were measured with, and what could not be measured."""
    settings = whole["settings"]
    rows = sorted(
        whole["rows"], key=lambda row: -row["budget"]
    )  # what is to be compared stands together
    absent = {*CATEGORIES} - {*settings.get("categories", CATEGORIES)}
    columns = {
        name: column
        for name, column in (_SCORED if settings["measure"] == SCORE else _AGREEMENT).items()
        if name not in absent
    }
    goals = goal_table(rows)
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    missing = {**whole["skipped"], **whole.get("failed", {})}
    parts = [
        *([markdown_table(goals)] if goals else []),
        markdown_table(table("", list(columns), lines, _note(settings, rows))),
        *_lookahead_tables(rows),
        *(f"Not measured: {name}: {reason}" for name, reason in missing.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _lookahead_tables(rows: Sequence[Row]) -> list[str]:
    """The table of lookahead's modes, where any was measured."""
    lines = [
        [
            f"{row['budget']:g}",
            row["policy"],
            mode["mode"],
            mode["images"],
            mode["same_tokens"],
            f"{mode['passes']:.1f}",
            f"{mode['tokens_a_pass']:.2f}",
            f"{mode['ms_per_token']:.2f}",
            f"{mode['cpu_ms_per_token']:.2f}",
            f"{mode['times_faster']:.2f}",
        ]
        for row in rows
        for mode in row.get("lookahead", ())
    ]
    return [markdown_table(table("Lookahead", LOOKAHEAD, lines, LOOKAHEAD_NOTE))] if lines else []


def _note(settings: dict[str, Any], rows: Sequence[Row]) -> str:
    return (
        f"Model {settings['model']} ({settings['model_fingerprint'][:12]}),"
        f" {settings['num_prompts']} prompts and {settings['seeds']}"
        f" seed{'s' * (settings['seeds'] > 1)} for each row, batches of {settings['batch']}, runner"
        f" {settings['runner']} on {settings['provider']}, {settings['machine']}, ssd-export"
        f" {settings['tool_version']}. "
        + (_SCORED_NOTE if settings["measure"] == SCORE else _AGREEMENT_NOTE).format(**settings)
        + _time_note(rows)
        + _unfinished_note(settings, rows)
    )


_SCORED_NOTE = (
    "Score: share of captions unseen in training whose image the checker accepts, 95 % Wilson"
    " interval; difference to the full cache with its 95 % interval, caption by caption. Loss:"
    " teacher-forced, thousandths of a nat per image token of {num_scenes} true scenes of captions"
    " unseen in training, above the full cache, ± one standard error of the differences; KL: from"
    " the full cache on the same scenes, in the same unit, ± one standard error."
)
_AGREEMENT_NOTE = (
    "Compared with the full cache on the same prompts and random numbers, ± one standard error; KL"
    " is teacher-forced, in thousandths of a nat per token of the guided distributions."
)


def _time_note(rows: Sequence[Row]) -> str:
    """Note on what the milliseconds are worth."""
    jobs = max((row.get("jobs", 0) for row in rows), default=0)
    beside = f" while {jobs} cells ran side by side, which slows both" if jobs > 1 else ""
    return (
        f" CPU ms: what the decode steps of a batch computed, per image token{beside}; `bench`"
        " measures speed."
        if jobs
        else ""
    )


def _unfinished_note(settings: dict[str, Any], rows: Sequence[Row]) -> str:
    missing = [
        f"{row['policy']} {row['budget']:g}"
        for row in rows
        if 0 < len(row.get("seeds", ())) < settings["seeds"]
    ]
    return f" With fewer seeds: {', '.join(missing)}." if missing else ""


def _with_error(mean: dict[str, Any], form: str, unit: float = 1, width: float = 1) -> str:
    """The mean in units and `width` standard errors; without them where there was one case only."""
    value = format(unit * mean["mean"], form)
    return (
        value
        if mean["standard_error"] is None
        else f"{value} ± {format(width * mean['standard_error'], form.lstrip('+'))}"
    )


def _percent(share: dict[str, Any]) -> str:
    return f"{100 * share['share']:.1f}"


def _score(row: Row) -> str:
    if "score" not in row:
        return NOT_MEASURED
    score = row["score"]
    return f"{_percent(score)} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _score_difference(row: Row) -> str:
    if row["policy"] == FULL or "score_above_full" not in row:
        return NOT_MEASURED
    difference = row["score_above_full"]
    return _with_error(difference, "+.1f", 100, 100 * Z95)


def _loss(row: Row) -> str:
    if "loss_above_full" not in row:
        return NOT_MEASURED
    mean = row["loss_above_full"]
    if row["policy"] == FULL:
        return f"0 (loss {THOUSANDTHS * row['loss']['mean']:.3f})"
    return _with_error(mean, "+.3f", THOUSANDTHS, THOUSANDTHS)


def _mean(name: str, digits: int, unit: float = 1) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if name not in row or row["policy"] == FULL:
            return NOT_MEASURED
        return _with_error(row[name], f".{digits}f", unit, unit)

    return text


def _category(name: str) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        return (
            _percent(row["categories"][name]) if name in row.get("categories", ()) else NOT_MEASURED
        )

    return shown


def _generated(row: Row, name: str, form: str) -> str:
    return format(row[name], form) if name in row else NOT_MEASURED


_Column = Callable[[Row], str]
_WHAT: dict[str, _Column] = {
    "budget": lambda row: f"{row['budget']:g}",
    "policy": lambda row: row["policy"],
}
_COST: dict[str, _Column] = {
    "image slots": lambda row: f"{row['image_slots_mean']:.1f}",
    "cache bytes an image": lambda row: _generated(row, "cache_bytes_per_image", ","),
    "CPU ms": lambda row: _generated(row, "cpu_ms_per_token", ".2f"),
}
_SCORED = {
    **_WHAT,
    "score %": _score,
    "against full": _score_difference,
    **{name: _category(name) for name in CATEGORIES},
    "loss above full": _loss,
    "KL": _mean("kl", 3, THOUSANDTHS),
    **_COST,
}
_AGREEMENT = {
    **_WHAT,
    "equal tokens": _mean("token_agreement", 3),
    "KL": _mean("kl", 3, THOUSANDTHS),
    "PSNR dB": _mean("psnr", 1),
    **_COST,
}


def sheet(
    spec: SweepSpec, rows: Sequence[Row], categories: Sequence[str] = CATEGORIES
) -> Image.Image:
    """The first images of seed 0 of the cells, the same prompts above each other; wrong ones
    framed in red.
    """
    drawn = draw_scenes(min(SHOWN, spec.num_prompts), 0, categories=categories)
    captions = [scene.caption for scene in drawn]
    shown = [row for row in rows if 0 in row.get("seeds", ())]
    if len(shown) > MAX_SHEET_ROWS:
        shown = [row for row in shown if row["policy"] == FULL or row["budget"] in GOAL_BUDGETS]
    lines = []
    for row in sorted(shown, key=lambda row: -row["budget"]):
        strip = read_strip(Part(row["policy"], row["budget"], 0).file(spec.out, ".png"))
        images = list(images_of(strip))
        label = f"{row['budget']:g}  {row['policy']}" + (
            f"  {_percent(row['score'])} %" if "score" in row else ""
        )
        wrong = [
            _wrong(image, caption) if "score" in row else ""
            for image, caption in zip(images, captions)
        ]
        lines.append((label, [Entry(*entry) for entry in zip(images, captions, wrong)]))
    return comparison_sheet(captions, lines)


def _wrong(image: Image.Image, caption: str) -> str:
    return "; ".join(judge_image(image, caption).reasons)
