"""What messages quote of other libraries."""

from __future__ import annotations

import pytest

from ssd_export.errors import UserError, first_line


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("\n one \n two", "one"),
        ("", "ValueError"),
        ("Token `\x1b[2J`\u202e", "Token `\\x1b[2J`\\u202e"),
        ("é" * 300, "é" * 200),
    ],
)
def test_one_printable_line_is_quoted(said: str, quoted: str) -> None:
    assert first_line(ValueError(said)) == quoted


def test_a_message_is_one_printable_line() -> None:
    assert (
        str(UserError("a\x7f.json is\nno file: \N{SNOWMAN}"))
        == "a\\x7f.json is no file: \N{SNOWMAN}"
    )
