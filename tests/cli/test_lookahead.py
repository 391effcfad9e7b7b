"""`generate --lookahead`: what is refused."""

from __future__ import annotations

import pytest

from ssd_export.cli.options import lookahead_of
from ssd_export.errors import UserError


@pytest.mark.parametrize(("text", "tokens"), [("off", 1), ("auto", "auto"), ("2", 2), ("64", 64)])
def test_off_or_a_number_of_tokens(text: str, tokens: int | str) -> None:
    assert lookahead_of(text) == tokens


@pytest.mark.parametrize("text", ["1", "0", "-4", "65", "Auto", "", "１６", "1e1", "9" * 5000])
def test_anything_else_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(UserError, match="use auto") as error:
        lookahead_of(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120
