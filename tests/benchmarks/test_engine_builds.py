"""The benchmark of builds measures a whole build, phase by phase, and says whether its bounds
hold.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.engine_builds import PHASES, measure_build, results_of
from ssd_export.tensorrt import plan as build_plan
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

RUN = {
    "weights": "int4",
    "shared": True,
    "seconds": 50.0,
    "cpu_seconds": 20.0,
    "engine_bytes": 7e8,
    "layers": 9,
    "peak_bytes": {"read": 1 << 28, "build": 2_900_000_000, "write": 1 << 30},
    "needed_bytes": 3 << 30,
}


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the peak is read from /proc")
def test_a_build_is_measured_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "gpu_here", lambda: None)
    path = shutil.copytree(
        bundle(checkpoint(TinyJanus(num_layers=1)), "streaming-llm", dtype="fp16"),
        tmp_path / "bundle",
    )
    before = sorted(path.rglob("*"))
    run = measure_build(path, "ada", "1:1:2", shared=True)
    assert run["weights"] == "float16" and run["layers"] > 0 and run["engine_bytes"] > 0
    assert set(run["peak_bytes"]) == set(PHASES) and min(run["peak_bytes"].values()) > 50 << 20
    assert run["peak_bytes"]["read"] < run["peak_bytes"]["build"]
    assert sorted(path.rglob("*")) == before


@pytest.mark.parametrize(
    "changes, bound",
    [
        ({}, "60 s, 3.0 GB: holds"),
        ({"seconds": 61.0}, "60 s, 3.0 GB: missed"),
        ({"peak_bytes": {"read": 1, "build": 3_100_000_000, "write": 1}}, "60 s, 3.0 GB: missed"),
        ({"weights": "float16"}, "120 s, 8.5 GB: holds"),
        ({"weights": "int8"}, "none"),
    ],
)
def test_a_missed_bound_is_said(changes: dict[str, object], bound: str) -> None:
    (table,) = results_of([{**RUN, **changes}], "ada", "1:1:8")["tables"]
    assert table["rows"][0][-1] == bound
    assert len(table["rows"][0]) == len(table["columns"])
