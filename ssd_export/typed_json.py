"""JSON files as typed values: frozen dataclasses in, or one line that names file, place, what is
expected and what was found.

msgspec does the work: 14 ms to import where pydantic takes 56 ms, and it reads plain dataclasses,
so that no room needs it but this module.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import msgspec

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
T = TypeVar("T")


def read_json(path: Path, form: type[T], way_out: str) -> T:
    """The typed value of a JSON file.

    Args: form: a dataclass, or a type made of them; way_out: how a wrong file is mended.
    Raises: OSError where the file cannot be read; UserError where it is none of this form.
    """
    return parse_json(read_file(path, MAX_BYTES), form, str(path), way_out)


def parse_json(content: bytes, form: type[T], source: str, way_out: str) -> T:
    """The typed value of JSON text. Raises: UserError, which begins with `source`."""
    try:
        return msgspec.json.decode(content, type=form)
    except msgspec.ValidationError as error:
        text = _explain(str(error), content)
    except RecursionError:
        text = "nested too deeply"
    except ValueError as error:  # malformed, or not UTF-8
        text = f"not JSON ({str(error).removeprefix('JSON is malformed: ')})"
    raise UserError(f"{source}: {text}; {way_out}")


def to_json(value: Any) -> str:
    """A dataclass as the text of a JSON file, as parse_json reads it back."""
    return json.dumps(asdict(value), indent=1, allow_nan=False) + "\n"


def wrong_value(source: str, place: str, expected: str, found: Any, way_out: str) -> UserError:
    """The error for a value of the right kind that cannot be: out of range, or against another."""
    return UserError(f"{source}: {place} is {shown(found)}, expected {expected}; {way_out}")


def shown(value: Any) -> str:
    """A value in a message: as JSON, cut to one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _explain(message: str, content: bytes) -> str:
    """msgspec's message with the names of the place and the value found there."""
    problem, _, where = message.partition(" - at `")
    steps = re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", where)
    try:
        value, place = _walk(msgspec.json.decode(content), [a or b for a, b in steps], problem)
    except RecursionError:
        return "nested too deeply"
    except (ValueError, LookupError):  # wrong twice: what was skipped is no JSON
        return f"not in its form ({message})"
    if missing := re.search(r"missing required field `(.*)`", problem):
        return f"{'.'.join(filter(None, (place, missing[1])))} is missing"
    if wanted := re.fullmatch(r"Expected (.*), got .*", problem):
        kinds = re.sub(r"`|\w+", lambda word: KINDS.get(word[0], word[0].strip("`")), wanted[1])
        expected = kinds.replace(" | ", " or ")
        return f"{place or 'the whole'} is {shown(value)}, expected {expected}"
    return f"{place or 'the whole'} is {shown(value)}: {problem[0].lower()}{problem[1:]}"


def _walk(value: Any, steps: list[str], problem: str) -> tuple[Any, str]:
    """The value that msgspec found wrong, and its place. Of a dict's entries msgspec gives no name
    (`[...]`): it is the first entry that the problem fits."""
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
    got = re.search(r"got `(\w+)`", problem)
    missing = re.search(r"missing required field `(.*)`", problem)
    for key, value in entries.items():
        try:
            found, _ = _walk(value, steps, problem)
        except (LookupError, TypeError, ValueError):
            continue
        if missing and isinstance(found, dict) and missing[1] not in found:
            return key
        if got and _kind(found) == got[1]:
            return key
    return next(iter(entries))


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null"}
    return names.get(type(value), type(value).__name__)
