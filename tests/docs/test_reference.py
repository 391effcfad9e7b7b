"""Pages made from the code say what the code is."""

from __future__ import annotations

from pathlib import Path

from docs.scripts import figure, reference

ROOT = Path(__file__).parents[2]


def test_the_command_line_page_is_up_to_date() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        f"run `{reference.COMMAND}`"
    )


def test_the_figure_is_up_to_date() -> None:
    assert figure.FIGURE.read_text(encoding="utf-8") == figure.figure(), (
        "run `python -m docs.scripts.figure`"
    )


def test_architecture_fits_its_reader() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
