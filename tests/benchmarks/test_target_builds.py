"""The table of builds for every target: what was built, what failed, and what was not run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.target_builds import COLUMNS, asked_for, results_of, targets
from ssd_export.report.measurement import markdown_table

GRAPH = {"seconds": 10.0, "peak_bytes": 3 << 20, "engine_bytes": 2_000_000}
RUN = {
    "bundle": "fp16",
    "weights": "float16",
    "plugin": "on",
    "target": "ada",
    "capabilities": [89],
    "graphs": {"prefill": GRAPH, "decode_step": GRAPH | {"peak_bytes": 9 << 20}},
}
FAILED = {"bundle": "fp16", "weights": "?", "plugin": "off", "target": "ada", "failed": "no memory"}


def test_what_was_measured_is_not_run_again() -> None:
    left = list(asked_for([Path("somewhere/fp16")], [RUN, FAILED]))
    assert set(targets()) >= {"ada", "ampere", "blackwell", "rtx"} and "hopper" not in targets()
    assert len(left) == 2 * len(targets()) - 2
    assert not any(target == "ada" for _, target, _ in left)


def test_rows_say_what_was_built_and_what_was_not_run() -> None:
    results = results_of([RUN, FAILED], [(Path("int4"), "rtx", "off")])
    built, failed, left = results["tables"][0]["rows"]
    assert built == ["float16", "on", "ada", "89", "10", "10", "none", "none", "20", "9", "4"]
    assert failed[-1] == "no memory" and len(failed) == len(COLUMNS)
    assert left[:3] == ["int4", "off", "rtx"]
    assert "| int4 | off | rtx | not run |" in markdown_table(results["tables"][0])
