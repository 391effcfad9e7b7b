"""The measurement of `auto` at a real shape, on a small one."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import lookahead_real_size
from benchmarks.lookahead_real_size import COLUMNS, main, too_slow


def test_the_small_shape_has_a_row_for_each_mode(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    options = "--shape small --layers 1 --weights int8 --grid-rows 1 --rounds 1"
    code = main([*options.split(), "--caches", "h2o 0.2", "--out", str(out)])
    measured = json.loads(out.read_text())
    (found,) = measured["results"]["tables"]
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    assert [(row["tokens are"], row["lookahead"]) for row in rows] == [
        (drawn, mode) for drawn in ("sampled", "greedy") for mode in ("off", "auto", "8")
    ]
    for row in rows:
        assert row["same tokens"] == "1 of 1" and row["weights"] == "int8"
        assert row["passes"] <= 23 and (row["lookahead"] != "off" or row["passes"] == 23)
    assert code == bool(too_slow(found["rows"]))
    assert "--shape small" in measured["command"]


def test_an_auto_that_is_slower_is_named() -> None:
    def row(mode: str, ratio: str) -> list[object]:
        values = dict.fromkeys(COLUMNS, "x") | {"lookahead": mode, "by CPU time": ratio}
        return list(values.values())

    assert too_slow([row("auto", "1.030"), row("8", "1.500"), row("off", "1.000")]) == []
    assert too_slow([row("auto", "1.031")]) == ["x, x, x: 1.031"]
    assert lookahead_real_size.SLOWER == 1.03
