"""The results of bench as tables, the same on the terminal and in documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ssd_export.bench.spec import FULL, TRANSFORMERS
from ssd_export.report.measurement import NOT_RUN, table

Row = dict[str, Any]
PROFILED = 8  # operator kinds that are named; the others are one row


def bench_tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, memory, share of the roofline and, where it was asked for, the profile."""
    rows = results["rows"]
    tables = [
        _table("Speed", _SPEED, rows, speed_note(results)),
        _table("Memory", _MEMORY, rows, _MEMORY_NOTE),
    ]
    bounded = [row for row in rows if "bound_ms_read" in row]
    if bounded:
        tables.append(_table("Share of the roofline", _ROOFLINE, bounded, roofline_note(results)))
    if "lookahead" in results:
        tables.append(_table("Lookahead", _LOOKAHEAD, results["lookahead"], _LOOKAHEAD_NOTE))
    return tables + [_profile(row) for row in rows if "profile" in row]


def speed_note(results: dict[str, Any]) -> str:
    """Notes below the speed table."""
    settings = results["settings"]
    return (
        f"Runner {settings['runner']} on {settings['provider']}, {settings['threads']} thread(s),"
        f" median of {settings['steps']} steps after a warm-up; a step generates one token of every"
        " image of the batch, guidance included. transformers is timed over its first tokens,"
        " where its growing cache is smallest. CPU: time of all threads; where one thread passed"
        " more time than that, something else ran. Ratios and shares are of CPU time for one"
        f" thread, else of time passed. {_images_note(settings.get('rounds', 0))}"
    )


def _images_note(rounds: int) -> str:
    if not rounds:
        return (
            "Images a minute: first token, first step (for which a large model's graph is opened"
            " again), 574 steps and image decoder; ratios are of a step."
        )
    return (
        f"Images a minute: median of {rounds} whole batches, from the prompt to the pixels, all"
        " caches in turns in one process. Ratios: the median of the rounds' ratios; beside them,"
        " those of a step alone."
    )


_MEMORY_NOTE = (
    "Each row is a separate process. Peak resident counts mapped weights; the second figure"
    " includes the image decoder. Load: from nothing to the first two tokens. The image"
    " decoder is measured once for each runner, with one image."
)

ABOVE_ALL = (
    " More than 100 %: the library of operators reads no empty slots, of which a cache has many in"
    " an image's first steps, and multiplies int4 and int8 weights in int8."
)


def roofline_note(results: dict[str, Any]) -> str:
    """Notes below the table of bounds."""
    rates = results["rates"]
    reading, copying, products = (
        rates[name] / 1e9 for name in ("read_bandwidth", "copy_bandwidth", "matrix_rate")
    )
    over = any(row.get("share_of_read_bound", 0) > 1 for row in results["rows"])
    return (
        f"Measured in the same run: {reading:.1f} GB/s reading (a matrix times a vector),"
        f" {copying:.1f} GB/s copying (read and written), {products:.0f} GFLOP/s in"
        f" {rates['dtype']} products. Bound: the greater of bytes / bandwidth and operations /"
        " rate." + ABOVE_ALL * over
    )


def _table(
    title: str, columns: dict[str, Callable[[Row], str]], rows: list[Row], note: str
) -> dict[str, Any]:
    return table(
        title, list(columns), [[cell(row) for cell in columns.values()] for row in rows], note
    )


def name_of(row: Row) -> str:
    """The name of a row: its policy and, where several have it, what it is."""
    if row["policy"] in (TRANSFORMERS, FULL):
        return f"{row['policy']}, {row['kind']}"
    return f"{row['policy']} {row['budget']:g}, {row['kind']}"


def _number(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: NOT_RUN if row.get(name) is None else f"{row[name] / scale:,.{digits}f}"


def _milliseconds(name: str) -> Callable[[Row], str]:
    """Three digits that mean something, from 0.8 to 8000."""
    return lambda row: (
        NOT_RUN
        if row.get(name) is None
        else f"{row[name]:,.{0 if row[name] >= 100 else 1 if row[name] >= 10 else 2}f}"
    )


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: NOT_RUN if row.get(name) is None else f"{row[name]:.2f}"


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: NOT_RUN if row.get(name) is None else f"{100 * row[name]:.0f} %"


def _bytes(name: str, unit: int, digits: int) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(name) is None else f"{row[name] / unit:,.{digits}f}"


_WHAT: dict[str, Callable[[Row], str]] = {"cache": name_of, "images": lambda row: str(row["batch"])}
_LOOKAHEAD: dict[str, Callable[[Row], str]] = {
    **_WHAT,
    "lookahead": lambda row: str(row["lookahead"]),
    "passes": _number("passes", 1),
    "tokens a pass": _ratio("tokens_per_pass"),
    "ms a token": _milliseconds("ms_per_token"),
    "off": _milliseconds("off_ms_per_token"),
    "times faster": _ratio("times_faster"),
}
_LOOKAHEAD_NOTE = (
    "Whole images, prompt and image decoder included, in turns with single steps (off): mean"
    " passes, tokens of each image that a pass gives, median ms, and the median of the rounds'"
    " ratios."
)
_SPEED = {
    **_WHAT,
    "first token ms": _milliseconds("first_token_ms"),
    "ms a token": _milliseconds("ms_per_token"),
    "p95": _milliseconds("ms_per_token_p95"),
    "CPU ms a token": _milliseconds("cpu_ms_per_token"),
    "image tokens/s": _number("image_tokens_per_second", 1),
    "images/min": _number("images_per_minute", 2),
    "times transformers": _ratio("ratio_to_transformers"),
    "times full cache": _ratio("ratio_to_full"),
    "times full cache, a step": lambda row: _ratio("ratio")(
        {"ratio": row.get("step_ratio_to_full", row.get("ratio_to_full"))}
    ),  # where no whole images were generated, both are of a step
}
_MEMORY = {
    **_WHAT,
    "cache MiB": _bytes("cache_bytes", 2**20, 1),
    "peak resident MiB": _bytes("peak_resident_bytes", 2**20, 0),
    "with image decoder MiB": _bytes("peak_resident_bytes_with_decoder", 2**20, 0),
    "device MiB": _bytes("device_bytes", 2**20, 0),
    "load s": _number("load_seconds", 1),
    "engine build s": _bytes("build_seconds", 1, 0),
    "image decoder s": _number("image_decoder_seconds", 2),
}
_ROOFLINE = {
    **_WHAT,
    "weights MB": lambda row: f"{row['step_cost']['weight_bytes'] / 1e6:,.1f}",
    "cache MB": lambda row: f"{row['step_cost']['cache_bytes'] / 1e6:,.1f}",
    "GFLOP": lambda row: f"{row['step_cost']['operations'] / 1e9:,.2f}",
    "limit": lambda row: row["limit"],
    "bound ms (reading)": _milliseconds("bound_ms_read"),
    "reached": _percent("share_of_read_bound"),
    "bound ms (copying)": _milliseconds("bound_ms_copy"),
    "reached ": _percent("share_of_copy_bound"),
}


def _profile(row: Row) -> dict[str, Any]:
    named, others = row["profile"][:PROFILED], row["profile"][PROFILED:]
    rows = [
        [
            entry["operator"],
            f"{entry['ms']:.3f}",
            f"{100 * entry['share']:.1f} %",
            f"{entry['calls']:.0f}",
        ]
        for entry in named
    ]
    if others:
        ms, share, calls = (
            sum(entry[name] for entry in others) for name in ("ms", "share", "calls")
        )
        rows.append(
            [f"{len(others)} other kinds", f"{ms:.3f}", f"{100 * share:.1f} %", f"{calls:.0f}"]
        )
    title = f"Where a step's time goes: {name_of(row)}, {row['batch']} image(s)"
    return table(
        title,
        ["operator", "ms a step", "share", "calls a step"],
        rows,
        "onnxruntime's own profile; recording it costs time too.",
    )


def lines_of(one: dict[str, Any]) -> list[str]:
    """A table in columns for a terminal."""
    cells = [one["columns"], *one["rows"]]
    widths = [max(len(str(row[index])) for row in cells) for index in range(len(one["columns"]))]
    rows = [
        "  ".join(
            str(cell).ljust(width) if index == 0 else str(cell).rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
    return [one["title"], *rows, one["note"], ""]


def bench_figures(results: dict[str, Any]) -> dict[str, str]:
    """Named numbers for running text: POLICY-KIND-IMAGES-WHAT, such as
    ssd-auto-fp32-1-ms_a_token.
    """
    columns = {
        "ms_a_token": "ms a token",
        "cpu_ms_a_token": "CPU ms a token",
        "images_a_minute": "images/min",
        "times_transformers": "times transformers",
        "times_full_cache": "times full cache",
        "step_times_full_cache": "times full cache, a step",
    }
    return {
        f"{row['policy']}-{row['kind']}-{row['batch']}-{name}": _SPEED[column](row)
        for row in results["rows"]
        for name, column in columns.items()
    }
