"""The C++ plugin, driven as TensorRT would drive it, launches what the kernel's source takes, and
what that computes is the reference's. Stand-ins take the places of TensorRT and the driver.

Needs cmake, a C++ compiler, the CUDA headers, TensorRT's headers (TENSORRT_ROOT or installed) and
Triton. What is missing is printed by the skip.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssd_export.verify.tolerances import TOLERANCES
from tests.plugins.test_build import ROOT, configure, library, pytestmark

__all__ = ["library", "pytestmark"]
pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
from tests.kernels.interpret import wanted_runs

LAUNCHER = ROOT / "tests" / "plugins" / "launcher"
RUNS = wanted_runs()


@pytest.fixture(scope="module")
def driven(library: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict]:
    """Lines of tests.plugins.drive_cases, and what the plugin said about each refusal."""
    folder = tmp_path_factory.mktemp("launcher")
    assert configure(folder, source=LAUNCHER).returncode == 0
    built = subprocess.run(
        ["cmake", "--build", str(folder)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.plugins.drive_cases", str(library), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = re.findall(r"^== (.*?)\n(.*?)(?=^== |\Z)", run.stderr, re.DOTALL | re.MULTILINE)
    return [json.loads(line) for line in run.stdout.splitlines()], dict(said)


@pytest.fixture(scope="module")
def lines(driven: tuple[list[dict], dict]) -> Iterator[dict[tuple[str, str | None], dict]]:
    yield {(line["case"], line.get("dtype")): line for line in driven[0]}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=map("-".join, RUNS))
def test_an_enqueue_is_the_reference_s_step(lines: dict, case: str, dtype: str) -> None:
    result = lines[case, dtype]
    assert result["wrong"] == [], "an argument of the launch"
    assert result["slots_equal"] and result["caches_equal"]
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


@pytest.mark.slow
def test_an_image_is_loaded_once_a_context_and_unloaded_with_its_last_plugin(lines: dict) -> None:
    found = lines["lifetimes", None]
    assert (found["loads"], found["unloads_before"], found["unloads"]) == (2, 0, 2)
    assert found["same_image"] and found["wrong"] == []


REFUSED = {
    "a copied cache": ([0, -1], "past_value and its output have different buffers; build with"),
    "not aligned": ([0, -1], "query is not aligned to 16 bytes"),
    "no workspace": ([0, -1], "TensorRT gave no workspace for the logits"),
    "another shape": ([-1, -1], r"key has shape \[3 x 1 x 8\] where \[3 x 2 x 8\] was expected"),
    "no context": ([-1, -1], "no CUDA context is current on this thread; call cudaSetDevice"),
    "another GPU": ([-1, -1], "cuModuleLoadData: a reason; the engine carries a kernel for anoth"),
    "no such kernel": ([-1, -1], "cuModuleGetFunction: a reason"),
    "a failed launch": ([0, -1], "cuLaunchKernel: a reason"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_launched_is_refused(lines: dict, driven: tuple, fault: str) -> None:
    results, message = REFUSED[fault]
    assert lines[fault, None]["results"] == results and lines[fault, None]["launches"] == 0
    assert re.search(message, driven[1][fault]), driven[1][fault]


@pytest.mark.slow
def test_without_a_fault_the_same_step_is_launched(lines: dict) -> None:
    assert lines["nothing", None] == {"case": "nothing", "results": [0, 0], "launches": 1}
