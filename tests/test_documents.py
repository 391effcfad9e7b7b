"""Documents say what the measurements say: rendered again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.write_documents import (
    BENCHMARKS,
    MARKED,
    REGION,
    REPOSITORY,
    SECTIONS,
    differing,
    documents,
    markdown_table,
)
from ssd_export.errors import UserError
from ssd_export.report.measurement import (
    measurement,
    publish,
    read_measurement,
    table,
    write_measurement,
)

COMMAND = "`python -m benchmarks.write_documents`"


def test_the_documents_say_what_was_measured() -> None:
    assert differing(REPOSITORY) == [], f"run {COMMAND}"


def test_every_measurement_is_shown_somewhere() -> None:
    shown = {name for section in SECTIONS for name in section.names}
    for path in (path for pattern in MARKED for path in REPOSITORY.glob(pattern)):
        shown |= {match[2] for match in REGION.finditer(path.read_text(encoding="utf-8"))}
    measured = {path.stem for path in (REPOSITORY / "docs/measurements").glob("*.json")}
    assert measured <= shown, f"no document shows {sorted(measured - shown)}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with one measurement, and a README that shows parts of it."""
    (tmp_path / "docs" / "measurements").mkdir(parents=True)
    results = {
        "tables": [table("Sizes", ["what", "MiB"], [["cache", 12], ["weights", None]], "one run")],
        "figures": {"cache": "12 MiB"},
    }
    write_measurement(
        tmp_path / "docs/measurements/build.json",
        measurement("python measure.py", results, "machine busy"),
    )
    (tmp_path / "README.md").write_text(
        "It takes <!-- measured:build.cache -->99<!-- /measured --> or <!-- measured:gpu.ms"
        " -->1<!-- /measured --> ms.\n\n<!-- measured:build -->\n<!-- /measured -->\n"
    )
    return tmp_path


def test_what_is_measured_and_what_is_not(repository: Path) -> None:
    written = documents(repository)
    readme, benchmarks = written[repository / "README.md"], written[repository / BENCHMARKS]
    assert "It takes <!-- measured:build.cache -->12 MiB<!-- /measured -->" in readme
    assert "<!-- measured:gpu.ms -->not run<!-- /measured --> ms" in readme
    for text in (readme, benchmarks):
        assert (
            "`python measure.py`" in text
            and "| cache | 12 |" in text
            and "| weights | not run |" in text
        )
        assert "ssd-export 0" in text and "machine busy" in text
    assert "gpu: **not run**." in benchmarks


def test_a_number_edited_by_hand_is_found(repository: Path) -> None:
    for path, text in documents(repository).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert differing(repository) == []
    path = repository / "README.md"
    path.write_text(path.read_text().replace("12 MiB", "10 MiB"))
    assert differing(repository) == [path]
    (repository / "docs/measurements/build.json").unlink()
    assert differing(repository) == [repository / BENCHMARKS, path]


def test_a_damaged_measurement_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("{", "is not JSON"),
        ('{"command": "x"}', "lacks machine, versions"),
        ("[]", "lacks command"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_measurement(tmp_path / "x.json")
    assert read_measurement(tmp_path / "none.json") is None


def test_tables_of_unequal_rows_are_a_bug() -> None:
    with pytest.raises(ValueError, match="Sizes: rows of .1. cells under 2 columns"):
        table("Sizes", ["a", "b"], [["1"]])


def test_a_bar_does_not_break_a_table() -> None:
    assert "| a\\|b |" in markdown_table(table("", ["x"], [["a|b"]]))


def test_images_are_published_beside_their_measurement(tmp_path: Path) -> None:
    (tmp_path / "pareto.png").write_bytes(b"png")
    publish(tmp_path / "sweep.json", "sweep", {"rows": []}, [tmp_path / "pareto.png"])
    assert (tmp_path / "sweep-pareto.png").read_bytes() == b"png"
    written: dict[str, Any] = json.loads((tmp_path / "sweep.json").read_text())
    assert (
        written["results"] == {"rows": []}
        and written["machine"]["cores"] >= 1
        and "python" in written["versions"]
    )
