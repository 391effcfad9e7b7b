"""Files of prompts, by their ending:

    .txt    a prompt a line
    .csv    a header names the columns: prompt, and any of the other fields
    .jsonl  an object a line: {"prompt": "a red circle", "seed": 7}

The fields are those of PromptLine, and class, a number or name in place of prompt. Blank lines are
left out and counted. UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import os_error
from ssd_export.sampling import Sampling, as_seed
from ssd_export.typed_json import parse_json, shown, wrong_value

MAX_FILE_BYTES = 64 << 20
MAX_LINES = 1_000_000
MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's limit; no prompt of so many fits into a model here
WAY_OUT = "correct that line"


@dataclass(frozen=True)
class PromptLine:
    """A prompt and what its line says of its images; None leaves it to the command's options."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    is_class: bool = False  # the prompt was given as a class


CLASS = "class"
FIELDS = (*(field.name for field in fields(PromptLine) if field.name != "is_class"), CLASS)
TEXTS = ("prompt", "negative_prompt")


def read_prompts(path: Path) -> dict[int, PromptLine]:
    """The prompts of a file by line number, 1 the first.

    Raises: UserError for another ending, a file that is too large or holds no prompt, and for the
    first line that is none, with its number.
    """
    readers = {".txt": _text_lines, ".csv": _table_lines, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} does not end in {', '.join(readers)}; name it for what it holds")
    try:
        content = read_file(path, MAX_FILE_BYTES)
    except OSError as error:
        raise os_error(error, "read", path) from error
    lines: dict[int, PromptLine] = {}
    for number, line in reader(_decoded(content, path), path):
        lines[number] = _checked(line, _place(path, number))
        if len(lines) > MAX_LINES:
            raise UserError(f"{path} has more than {MAX_LINES} prompts; split it")
    if not lines:
        raise UserError(f"{path} holds no prompt; write one a line")
    return lines


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{_place(path, number)}: not UTF-8; save the file in UTF-8") from None


def _text_lines(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, PromptLine(line.strip())


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            source, content = _place(path, number), line.encode()
            values = parse_json(content, dict[str, Any], source, WAY_OUT)
            _check_names(values, source)
            if CLASS in values:
                content = json.dumps(_with_class(values, source)).encode()
            yield number, parse_json(content, PromptLine, source, WAY_OUT)


def _table_lines(text: str, path: Path) -> Iterator[tuple[int, PromptLine]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    number = 1
    try:
        for cells in rows:
            source = _place(path, number)
            number, started = rows.line_num + 1, number
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                _check_columns(columns, source)
                continue
            if len(cells) != len(columns):
                text = f"{len(cells)} columns where the header has {len(columns)}"
                raise UserError(f"{source}: {text}; quote a prompt that holds a comma")
            yield started, _from_cells(dict(zip(columns, cells)), source)
    except csv.Error as error:
        raise UserError(f"{_place(path, number)}: not CSV ({error}); {WAY_OUT}") from None


def _from_cells(cells: dict[str, str], source: str) -> PromptLine:
    """A line of a table; an empty cell says nothing."""
    values: dict[str, Any] = {"prompt": ""}
    for name, cell in cells.items():
        if name in TEXTS:
            values[name] = cell
        elif name == CLASS:
            if cell.strip():
                values[name] = cell.strip()
        elif cell.strip():
            form: type = int if name in ("seed", "top_k") else float
            try:
                values[name] = parse_json(cell.strip().encode(), form, source, WAY_OUT)
            except UserError:
                expected = "a whole number" if form is int else "a number"
                raise wrong_value(source, name, expected, cell, WAY_OUT) from None
    return PromptLine(**(_with_class(values, source) if CLASS in values else values))


def _with_class(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of a line with its class as the prompt. Raises: UserError."""
    kind = values.pop(CLASS)
    if values.get("prompt"):
        raise UserError(f"{source}: prompt and class say the same thing; give one of them")
    if isinstance(kind, bool) or not isinstance(kind, (int, str)) or kind == "":
        raise wrong_value(source, CLASS, "a class's number or name", kind, WAY_OUT)
    return {**values, "prompt": str(kind), "is_class": True}


def _check_columns(columns: list[str], source: str) -> None:
    _check_names(columns, source)
    if not {"prompt", CLASS} & {*columns} or len(set(columns)) < len(columns):
        raise UserError(
            f"{source}: the header is {shown(columns)}; name each column once, one of them prompt"
            " or class"
        )


def _check_names(names: Any, source: str) -> None:
    for name in names:
        if name not in FIELDS:
            listed = ", ".join(FIELDS)
            raise UserError(f"{source}: unknown field {shown(name)}; use {listed}")


def _checked(line: PromptLine, source: str) -> PromptLine:
    """Returns the line if it is valid. Raises: UserError for numbers out of range and endless
    text.
    """
    for name in TEXTS:
        count = len(getattr(line, name) or "")
        if count > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"{source}: {name} has {count} characters, at most {MAX_PROMPT_CHARACTERS} are"
                " read; shorten it"
            )
    try:
        if line.seed is not None:
            as_seed(line.seed)
        Sampling().changed(line.cfg_scale, line.temperature, line.top_k)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return line


def _place(path: Path, number: int) -> str:
    return f"{path}, line {number}"
