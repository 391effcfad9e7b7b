"""Pages made from the code say what the code is."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from docs.scripts import figure, reference

ROOT = Path(__file__).parents[2]
BUNDLE = (ROOT / "docs" / "reference" / "bundle.md").read_text(encoding="utf-8")
# The table of a dataclass's fields stands below a comment that names it.
FIELDS = re.compile(r"<!-- fields: ([\w.]+) -->\n\n\|.*\n\|---.*\n((?:\|.*\n)+)")
ROW = re.compile(r"\| `(\w+)` \| `(.+?)` \| (.+) \|")
TABLES = {name: ROW.findall(rows) for name, rows in FIELDS.findall(BUNDLE)}


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


@pytest.mark.parametrize("name", TABLES)
def test_the_bundle_page_lists_every_field(name: str) -> None:
    module, _, form = name.rpartition(".")
    fields = dataclasses.fields(getattr(importlib.import_module(module), form))
    listed = [(field, kind.replace("\\|", "|")) for field, kind, _ in TABLES[name]]
    assert listed == [(field.name, field.type) for field in fields], (
        f"{name} in reference/bundle.md"
    )


def test_no_form_inside_the_bundle_s_files_is_forgotten() -> None:
    """Every dataclass that ssd_config.json and manifest.json are made of has its table."""
    listed = {name.rpartition(".")[2] for name in TABLES}
    kinds = [kind for rows in TABLES.values() for _, kind, _ in rows]
    named = {word for kind in kinds for word in re.findall(r"\b[A-Z]\w+", kind)}
    not_forms = {"None", "ModelDtype", "WeightFormat", "Dimension", "Any", "Form"}
    aliases = {"Rows", "Bounds", "HeadOption", "StoredWeight"}  # explained where they are named
    assert named - not_forms - aliases <= listed
    assert {"BundleConfig", "Manifest", "HeadMap", "EngineManifest"} <= listed
