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
from pathlib import Path

import pytest

from ssd_export.export.plugin_flavor import SETTLE, WINDOW, NodeKind
from ssd_export.kernels.compile import kernel_arguments
from ssd_export.kernels.image import LAYER as LAYER_KERNEL
from ssd_export.kernels.image import NODE_KERNELS
from ssd_export.verify.tolerances import TOLERANCES
from tests.plugins.test_build import ROOT, configure, library, pytestmark

__all__ = ["library", "pytestmark"]
pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
from tests.kernels.interpret import ThreeGroups
from tests.kernels.interpreted import interpreted
from tests.plugins.drive_cases import A_WINDOW, IN_PARTS, LAYER, driven_runs, driven_windows

LAUNCHER = ROOT / "tests" / "plugins" / "launcher"
RUNS = driven_runs()


@pytest.fixture(scope="module")
def driven(library: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict]:
    """Lines of tests.plugins.drive_cases, and what the plugin said about each refusal."""
    folder = tmp_path_factory.mktemp("launcher")
    assert configure(folder, source=LAUNCHER).returncode == 0
    built = subprocess.run(
        ["cmake", "--build", str(folder)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    libraries = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    run = interpreted("-m", "tests.plugins.drive_cases", library, folder, LD_LIBRARY_PATH=libraries)
    said = re.findall(r"^== (.*?)\n(.*?)(?=^== |\Z)", run.stderr, re.DOTALL | re.MULTILINE)
    return [json.loads(line) for line in run.stdout.splitlines()], dict(said)


@pytest.fixture(scope="module")
def lines(driven: tuple[list[dict], dict]) -> dict[tuple[str | None, str, str | None], dict]:
    return {(line.get("form"), line["case"], line.get("dtype")): line for line in driven[0]}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case", "dtype"), RUNS, ids=map("-".join, RUNS))
def test_an_enqueue_is_the_reference_s_step(lines: dict, form: str, case: str, dtype: str) -> None:
    result = lines[form, case, dtype]
    assert result["wrong"] == [], "an argument of the launch"
    assert result["slots_equal"] and result["caches_equal"]
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kernels"), [(LAYER, ["layer"]), (IN_PARTS, ["part", "sum"])])
def test_groups_of_a_layer_are_served_by_one_enqueue(
    lines: dict, form: str, kernels: list[str]
) -> None:
    result = lines[form, "three groups", "float32"]
    assert result["wrong"] == [] and result["kernels"] == kernels
    assert result["slots_equal"] and result["evicted"] == len(ThreeGroups.GROUPS)
    assert result["error"] <= TOLERANCES["float32"].kernel


@pytest.mark.slow
def test_a_workspace_for_the_most_rows_is_enough_for_fewer_on_any_gpu(lines: dict) -> None:
    found = {case: line for (_, case, _), line in lines.items() if "multiprocessors" in case}
    assert len(found) == 24 and {line["splits"] for line in found.values()} > {1}
    assert not [(case, line["wrong"]) for case, line in found.items() if line["wrong"]]


@pytest.mark.slow
def test_images_are_loaded_once_a_context_and_unloaded_with_its_last_plugin(lines: dict) -> None:
    found = lines[None, "lifetimes", None]
    assert (found["loads"], found["unloads_before"], found["unloads"]) == (6, 0, 6)
    assert found["same_images"] and found["wrong"] == []


@pytest.mark.slow
def test_every_argument_that_is_not_as_expected_is_named(lines: dict) -> None:
    """Else the comparison above would show nothing."""
    found = {
        case: line
        for (form, case, _), line in lines.items()
        if form is None and case.startswith("another ")
    }
    compared = {case: line for case, line in found.items() if "wrong" in line}
    parameters = {argument["name"].partition("[")[0] for argument in kernel_arguments(LAYER_KERNEL)}
    kept = {"logits_ptr"}  # compared with the bounds of the workspace
    assert compared.keys() == {f"another {name}" for name in parameters - kept | {"grid"}}
    for case, line in compared.items():
        name = case.removeprefix("another ")
        said = "layer: grid, block, shared is" if name == "grid" else rf"{name}(\[0\])? is"
        assert line["results"] == [0, -1] and len(line["wrong"]) == 1
        assert re.match(rf"{said} .*, not ", line["wrong"][0]), line["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), driven_windows(), ids=map("-".join, driven_windows()))
def test_a_window_is_the_reference_s(lines: dict, case: str, dtype: str) -> None:
    result = lines[A_WINDOW, case, dtype]
    assert result["wrong"] == [], "an argument of a launch"
    assert result["slots_equal"], "of positions, keys and values"
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WINDOW, SETTLE], ids=lambda kind: kind.op_type)
def test_every_argument_of_a_window_that_is_not_as_expected_is_named(
    lines: dict, kind: NodeKind
) -> None:
    found = {case: line for (form, case, _), line in lines.items() if form == kind.op_type}
    parameters = {
        argument["name"].partition("[")[0]
        for kernel in NODE_KERNELS[kind.op_type]
        for argument in kernel_arguments(kernel)
    }
    grids = {"grid", "number of queries"} if kind is WINDOW else {"grid"}
    assert found.keys() == {f"another {name}" for name in parameters | grids}
    for case, line in found.items():
        name = case.removeprefix("another ")
        said = r"\w+: grid, block, shared is" if name in grids else rf"{name}(\[0\])? is"
        assert line["results"] == [-1] and len(line["wrong"]) == 1
        assert re.match(rf"{said} .*, not ", line["wrong"][0]), line["wrong"]


REFUSED = {
    "a copied cache": (
        [0, -1],
        "past_value of group 0 and its output have different buffers; build with",
    ),
    "not aligned": ([0, -1], "past_value of group 0 is not aligned to 16 bytes"),
    "no workspace": ([0, -1], r"TensorRT gave no workspace of \d+ bytes"),
    "another shape": ([-1, -1], "the kernel is for head_dim 8, the model has 7"),
    "no context": ([-1, -1], "no CUDA context is current on this thread; call cudaSetDevice"),
    "no such device": ([-1, -1], "cuDeviceGetAttribute: a reason"),
    "another GPU": ([-1, -1], "cuModuleLoadData: a reason; the engine carries a kernel for anoth"),
    "no such kernel": ([-1, -1], "cuModuleGetFunction: a reason"),
    "a failed launch": ([0, -1], "cuLaunchKernel: a reason"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_launched_is_refused(lines: dict, driven: tuple, fault: str) -> None:
    results, message = REFUSED[fault]
    found = lines[None, fault, None]
    assert found["results"] == results and found["launches"] == []
    assert re.search(message, driven[1][fault]), driven[1][fault]


@pytest.mark.slow
def test_without_a_fault_the_same_step_is_launched(lines: dict) -> None:
    found = lines[None, "nothing", None]
    assert found == {"case": "nothing", "results": [0, 0], "launches": ["layer"]}
