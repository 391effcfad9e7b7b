"""A wrong value is named by file, place, what is expected and what was found."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ssd_export.errors import UserError
from ssd_export.typed_json import parse_json, read_json, report_json, shown, to_json


@dataclass(frozen=True)
class Item:
    count: int
    share: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Form:
    items: dict[str, Item]
    pair: tuple[int, int] = (1, 2)
    many: tuple[Item, ...] = ()
    name: str | None = None
    nested: dict[str, dict[str, int]] = field(default_factory=dict)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"items": {"x": {"count": 1}, "y": {"count": "2"}}}', 'items.y.count is "2", expected a'),
        ('{"items": {"x": {"count": 1}, "y": {}}}', "items.y.count is missing"),
        ('{"items": {"x": {"count": 1.5}}}', "items.x.count is 1.5, expected a whole number"),
        ('{"items": {"x": {"count": true}}}', "items.x.count is true, expected a whole number"),
        ('{"items": {"x": {"count": 1, "kind": "c"}}}', 'items.x.kind is "c", expected a or b'),
        ('{"items": {}, "many": [{"count": 1}, null]}', "many[1] is null, expected an object"),
        ('{"items": {}, "pair": [1]}', "pair is [1], expected a list of length 2"),
        ('{"items": {}, "pair": "ab"}', 'pair is "ab", expected a list'),
        ('{"items": {}, "name": 3}', "name is 3, expected text or null"),
        (
            '{"items": {}, "nested": {"a": {}, "b": {"c": []}}}',
            "nested.b.c is [], expected a whole",
        ),
        ("{}", "items is missing"),
        ("[]", "the whole is [], expected an object"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"items": {"x": {"count": 1, "share": NaN}}}', "not JSON"),
        ('{"items": {"x": {"count": 1, "share": 1e999}}}', "out of range"),
        ('{"items": {"x": {"count": 1' + "0" * 5000 + "}}}", "out of range"),
        ('{"items": ' + "[" * 100_000, "nested too deeply"),
        ('{"items": {}, "other": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_each_wrong_value_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json(text.encode(), Form, "f.json", "mend it")
    assert str(error.value).startswith("f.json: ") and str(error.value).endswith("; mend it")
    assert message in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", [b"\xff", b'{"items": {"\xff": 1}}', b"\xef\xbb\xbf{}"])
def test_other_encodings_are_no_json(content: bytes) -> None:
    with pytest.raises(UserError, match="f.json: not JSON .*; mend it"):
        parse_json(content, Form, "f.json", "mend it")


def test_what_is_written_is_read() -> None:
    form = Form({"x": Item(3, 1.0, "b")}, (4, 5), (Item(1),), "n", {"a": {"b": 2}})
    assert parse_json(to_json(form).encode(), Form, "", "") == form
    assert parse_json(b'{"items": {}, "of a later tool": [1]}', Form, "", "") == Form({})


def test_only_regular_files_of_a_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is a named pipe"), (".", "is a folder")):
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name, Form, "mend it")
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read_json(Path("/dev/zero"), Form, "mend it")
    monkeypatch.setattr("ssd_export.typed_json.MAX_BYTES", 10)
    (tmp_path / "large").write_bytes(b" " * 11)
    with pytest.raises(UserError, match="has more than 10 bytes"):
        read_json(tmp_path / "large", Form, "mend it")


def test_values_are_shown_short_and_printable() -> None:
    assert shown("x" * 100) == '"' + "x" * 59 + "..." and shown("\x1b[2J") == '"\\u001b[2J"'


def test_a_report_is_json_for_every_reader() -> None:
    """NaN and Infinity are Python's alone: a strict reader ends at the first."""
    measured = {"share": math.nan, "cells": [(1, math.inf), {"low": -math.inf, "high": 0.5}]}
    text = report_json(measured)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"share": None, "cells": [[1, None], {"low": None, "high": 0.5}]}
