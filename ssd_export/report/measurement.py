"""A measurement as a JSON file: what was measured, by which command, on what. Documents are written
from these files.

    {"command":  "python cli.py bench ...",     as somebody else would type it
     "machine":  {"system", "cpu", "cores", "memory_gib", "device"},
     "versions": {"ssd-export": "0.1.0", "python": "3.11.7", ...},
     "note":     "" or what to know about the circumstances ("machine busy with other work"),
     "results":  {"tables":  [{"title", "columns": [...], "rows": [[...]], "note"}], ...
                  "figures": {"name": value}, ...}}

tables and figures are optional: `python -m benchmarks.write_documents` writes tables into
documents as they are, figures where a document names them; it has its own form for the results
of bench and sweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ssd_export.errors import UserError
from ssd_export.files import write_file
from ssd_export.report.environment import machine, versions
from ssd_export.typed_json import report_json

NOT_RUN = "not run"
FIELDS = ("command", "machine", "versions", "note", "results")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
) -> dict[str, Any]:
    """A table of a measurement; every row has a cell for each column, None is written as "not
    run".
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(
            f"{title}: rows of {sorted({len(row) for row in rows})} cells under {len(columns)}"
            " columns"
        )
    return {
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
    }


def markdown_table(one: dict[str, Any]) -> str:
    """A table of a measurement in Markdown; None is written as not run."""
    lines = [_line(one["columns"]), "|" + "---|" * len(one["columns"]), *map(_line, one["rows"])]
    title = [f"**{one['title']}**", ""] if one["title"] else []
    return "\n".join([*title, *lines, *(["", one["note"]] if one["note"] else [])])


def _line(cells: list[Any]) -> str:
    return (
        "| "
        + " | ".join(NOT_RUN if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        + " |"
    )


def measurement(command: str, results: dict[str, Any], note: str = "") -> dict[str, Any]:
    """The results with the machine and the versions that this process runs on."""
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "note": note,
        "results": results,
    }


def write_measurement(path: Path, measured: dict[str, Any]) -> None:
    """Writes a measurement, whole or not at all. Raises: UserError where the folder is missing or
    not writable.
    """
    write_file(path, lambda file: file.write((report_json(measured) + "\n").encode()))


def publish(path: Path, command: str, results: dict[str, Any], images: Sequence[Path]) -> None:
    """Writes a measurement, and its images beside it: sweep.json and sweep-pareto.png. Raises:
    UserError as above.
    """
    for image in images:
        content = image.read_bytes()
        write_file(
            path.with_name(f"{path.stem}-{image.name}"),
            partial(_write, content),
        )
    write_measurement(path, measurement(command, results))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def read_measurement(path: Path) -> dict[str, Any] | None:
    """The measurement of a file, None where it was not run. Raises: UserError for a damaged
    file.
    """
    if not path.exists():
        return None
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); measure again") from error
    missing = (
        [name for name in FIELDS if name not in measured]
        if isinstance(measured, dict)
        else list(FIELDS)
    )
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; write it with ssd_export.report.measurement"
        )
    return measured
