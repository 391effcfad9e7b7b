"""The measurement of real sizes, on a small shape: every step in a separate process, a file that
is whole after each.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real_size
from benchmarks.real_size import Case, measure, record

pytestmark = pytest.mark.slow

CASES = (
    Case(
        "small fp16",
        "small",
        "original",
        "--dtype fp16 --policy h2o",
        {
            "at once": "--tokens 3 --threads 1 --widen at-once",
            "on use": "--tokens 3 --threads 1 --widen on-use",
        },
    ),
    Case("small int4", "small", "original", "--dtype fp32 --policy h2o --weights int4", {}),
)


def test_a_case_is_exported_and_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_size, "CASES", CASES)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = tmp_path / "real_size.json"
    measure(CASES[0], tmp_path, path)
    written = json.loads(path.read_text())
    export, generated = (
        written["results"]["exports"]["small fp16"],
        written["results"]["generations"],
    )
    assert 50 << 20 < export["peak_bytes"] < 4 << 30 and export["bundle_bytes"] > 1 << 20
    assert generated["on use"]["widened_on_use"] and not generated["at once"]["widened_on_use"]
    assert generated["on use"]["cache_bytes"] == generated["at once"]["cache_bytes"] > 0
    assert all(
        row["ms_per_token"] > 0 and row["seconds_image_decoder"] > 0 for row in generated.values()
    )
    assert not (tmp_path / "bundle").exists()
    exports, generations = written["results"]["tables"]
    assert [row[0] for row in generations["rows"]] == ["at once", "on use"]
    assert exports["rows"][1][:3] == [
        "small int4",
        "original",
        "`--dtype fp32 --policy h2o --weights int4`",
    ]
    assert exports["rows"][1][3:] == [None] * 4, "what was not measured says so"
    assert set(written["results"]["figures"]) >= {
        "export_small_fp16_peak",
        "generate_on_use_ms",
        "generate_on_use_peak",
    }


def test_a_row_measured_again_replaces_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_size, "CASES", CASES)
    path, row = (
        tmp_path / "m.json",
        {"seconds": 2.0, "peak_bytes": 3e9, "bundle_bytes": 1e9, "load": 0.1},
    )
    for label, seconds in (("small int4", 9.0), ("small fp16", 4.0), ("small int4", 5.0)):
        record(path, "exports", label, {**row, "seconds": seconds})
    rows = json.loads(path.read_text())["results"]["tables"][0]["rows"]
    assert [(row[0], row[3]) for row in rows] == [("small fp16", "4"), ("small int4", "5")]
