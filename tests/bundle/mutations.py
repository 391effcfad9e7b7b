"""JSON documents with one thing wrong: every key removed, every value replaced."""

from __future__ import annotations

import json
from typing import Any

Path = tuple[str | int, ...]
REMOVED = "removed"
_TEXTS = (
    "null",
    "-1",
    "0",
    "1",
    "2147483648",
    "1" + "0" * 19,
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "0.5",
    "-0.5",
    "1e-300",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "true",
    '""',
    '"x"',
    '"../../etc/passwd"',
    '"\\u001b[2J\\n"',
    '"\\ud800"',
    json.dumps("x" * 100_000),
    "[]",
    "[1]",
    '["a"]',
    "[[[]]]",
    "{}",
    '{"a": 1}',
    "[" * 1000 + "]" * 1000,
    '{"a":' * 1000 + "1" + "}" * 1000,
    "[" * 100_000,
)
# By a short name; as JSON text, because some of it is none that Python writes.
WRONG_VALUES = {text if len(text) < 40 else f"{text[:12]} x {len(text)}": text for text in _TEXTS}
MARK = '"a value that no document has"'


def places(document: Any, at: Path = ()) -> list[Path]:
    """The path of every value inside a document."""
    keys = (
        document.keys()
        if isinstance(document, dict)
        else range(len(document))
        if isinstance(document, list)
        else ()
    )
    return [path for key in keys for path in ((*at, key), *places(document[key], (*at, key)))]


def mutated(text: str, place: Path, wrong: str) -> bytes:
    """The document with the value at a place replaced by one of WRONG_VALUES, or removed."""
    document = json.loads(text)
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    if wrong == REMOVED:
        del parent[place[-1]]
        return json.dumps(document).encode()
    parent[place[-1]] = json.loads(MARK)
    return json.dumps(document).replace(MARK, WRONG_VALUES[wrong]).encode()
