"""JSON files as typed values: frozen dataclasses in, or one line that names file, place, what is
expected and what was found.

msgspec does the work: 14 ms to import where pydantic takes 56 ms, and it reads plain dataclasses,
so that no room needs it but this module.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ssd_export.errors import UserError
from ssd_export.files import read_file

MAX_BYTES = 64 << 20  # of a JSON file: the largest are head maps with costs, of some megabytes
SHOWN = 60  # characters of a wrong value in a message
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
# Metadata of a dataclass field that files leave out where it has its default, so that files without
# what it means stay as they were before there was such a field.
ABSENT_BY_DEFAULT = {"absent_by_default": True}
T = TypeVar("T")


def read_json(path: Path, form: type[T], way_out: str) -> T:
    """The typed value of a JSON file.

    Args: form: a dataclass, or a type made of them; way_out: how a wrong file is mended.
    Raises: OSError where the file cannot be read; UserError where it is none of this form.
    """
    return parse_json(read_file(path, MAX_BYTES), form, str(path), way_out)


def parse_json(content: bytes, form: type[T], source: str, way_out: str) -> T:
    """The typed value of JSON text. Raises: UserError, which begins with `source`."""
    import msgspec  # here, so that what only writes JSON needs no package

    try:
        return msgspec.json.decode(content, type=form)
    except msgspec.ValidationError as error:
        text = _explain(str(error), content, form)
    except RecursionError:
        text = "nested too deeply"
    except ValueError as error:  # malformed, or not UTF-8
        text = f"not JSON ({str(error).removeprefix('JSON is malformed: ')})"
    raise UserError(f"{source}: {text}; {way_out}")


def to_json(value: Any) -> str:
    """A dataclass as the text of a JSON file, as parse_json reads it back."""
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses as dicts, at any depth, as files have them (ABSENT_BY_DEFAULT)."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (field.metadata and getattr(value, field.name) == field.default)
        }
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def report_json(value: Any) -> str:
    """Plain data as the text of a report that any JSON reader takes: null where a number is not
    known (NaN) or has no bound, since JSON has neither.
    """
    return json.dumps(_known(value), indent=1, allow_nan=False)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wrong_value(source: str, place: str, expected: str, found: Any, way_out: str) -> UserError:
    """The error for a value of the right kind that cannot be: out of range, or against another."""
    return UserError(f"{source}: {place} is {shown(found)}, expected {expected}; {way_out}")


def shown(value: Any) -> str:
    """A value in a message: as JSON, cut to one short line."""
    text = "".join(
        letter if letter.isprintable() else repr(letter)[1:-1]
        for letter in json.dumps(value, default=str)[: SHOWN + 1]
    )
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _explain(message: str, content: bytes, form: Any) -> str:
    """msgspec's message with the names of the place and the value found there."""
    import msgspec

    problem, _, where = message.partition(" - at `")
    steps = re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", where)
    names = [name or index for name, index in steps]
    try:
        value, place = _walk(msgspec.json.decode(content), names, problem)
    except RecursionError:
        return "nested too deeply"
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # wrong twice: what was skipped is no JSON
        return f"not in its form ({message[:200]})"
    if missing := re.search(r"missing required field `(.*)`", problem):
        return f"{'.'.join(filter(None, (place, missing[1])))} is missing"
    if problem.startswith("Invalid enum value"):
        problem = f"expected {' or '.join(map(str, get_args(_form_at(form, names))))}"
    text = re.sub(r"`([^`]*)`", lambda quoted: _in_words(quoted[1]), problem.partition(", got ")[0])
    return f"{place or 'the whole'} is {shown(value)}, {text[0].lower()}{text[1:]}"


def _in_words(kinds: str) -> str:
    """msgspec's `int | null` as "a whole number or null"."""
    return " or ".join(KINDS.get(kind, kind) for kind in kinds.split(" | "))


def _form_at(form: Any, steps: list[str]) -> Any:
    """The type of a place: of a field by its name, of any item of a list or a dict."""
    for step in steps:
        if dataclasses.is_dataclass(form):
            form = get_type_hints(form)[step]
        else:
            form = [item for item in get_args(form) if item is not Ellipsis][-1]
    return form


def _walk(value: Any, steps: list[str], problem: str) -> tuple[Any, str]:
    """The value that msgspec found wrong, and its place. Of a dict's entries msgspec gives no name
    (`[...]`): it is the first entry that the problem fits. Raises: LookupError where none does."""
    place = ""
    for index, step in enumerate(steps):
        if step == "...":
            key = _first_wrong(value, steps[index + 1 :], problem)
            value, place = value[key], f"{place}.{key}"
        elif isinstance(value, list):
            value, place = value[int(step)], f"{place}[{step}]"
        else:
            value, place = value[step], f"{place}.{step}"
    return value, place.removeprefix(".")


def _first_wrong(entries: dict[str, Any], steps: list[str], problem: str) -> str:
    for key, value in entries.items():
        try:
            found, _ = _walk(value, steps, problem)
        except (LookupError, TypeError, ValueError, AttributeError):
            continue
        if _is_it(found, problem):
            return key
    raise LookupError(problem)


def _is_it(value: Any, problem: str) -> bool:
    """Whether a value has the problem that msgspec tells."""
    if missing := re.search(r"missing required field `(.*)`", problem):
        return isinstance(value, dict) and missing[1] not in value
    if length := re.search(r"of length (\d+)", problem):
        return isinstance(value, list) and len(value) != int(length[1])
    if got := re.search(r"got `(\w+)`", problem):
        return _kind(value) == got[1]
    return isinstance(value, str) and problem == f"Invalid enum value {value!r}"


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null"}
    return names.get(type(value), type(value).__name__)
