"""An image by phase: every phase is there, and the steps of a few tokens stand for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.image_phases import ANOTHER, PEAK, compare, measured, results_of
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.runtime.ort_operators import LIBRARY_VARIABLE, find_operators


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's."""
    return export_bundle(ExportSpec(out=tmp_path_factory.mktemp("phases") / "b"))


def test_the_phases_are_the_image(bundle: Path) -> None:
    found = measured(bundle, 1, 5)
    another, peak = found.pop(ANOTHER), found.pop(PEAK)
    whole = found.pop("image")
    assert list(found) == [
        "imports",
        "files checked",
        "prefill opened",
        "prefill",
        "decode step opened, first step",
        "steps",
        "image decoder opened, first image",
    ]
    assert min(found.values()) > 0 and another > 0 and peak > 2**26
    assert sum(found.values()) == pytest.approx(whole)


def test_a_table_has_a_column_for_every_bundle_and_kind_of_operators(bundle: Path) -> None:
    found = compare({"a": bundle, "b": bundle}, 1, 3, rounds=1)
    (table,) = results_of(found, "")["tables"]
    kinds = 2 if find_operators() else 1
    assert table["columns"] == ["phase", *found] and len(found) == 2 * kinds
    assert {len(row) for row in table["rows"]} == {1 + 2 * kinds}


def test_what_was_before_has_ordinary_operators(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that does not load is not asked for."""
    library = bundle.parent / "no-library.so"
    library.write_bytes(b"no library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    assert measured(bundle, 1, 5, ordinary=True)["image"] > 0
    with pytest.raises(SystemExit, match="failed with exit code 1"):
        measured(bundle, 1, 5)


def test_a_bundle_that_does_not_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="missing failed with exit code 1"):
        measured(tmp_path / "missing", 1, 5)
