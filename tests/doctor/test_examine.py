"""What works follows from what was tried; the exit code says it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ssd_export.doctor import examine as module
from ssd_export.doctor.child import Answer
from ssd_export.doctor.examine import ABILITIES, Examination, examine

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ALL = {
    ("onnxruntime",): Answer(facts={"version": "1.31", "providers": [CUDA, CPU]}),
    ("provider", CPU): Answer(),
    ("provider", CUDA): Answer(),
    ("operators",): Answer(facts={"path": "/x/libssd_export_operators.so"}),
    ("torch",): Answer(facts={"version": "2.6", "cuda": "13.0", "gpu": "H100", "threads": 2}),
    ("exporter",): Answer(),
    ("runner", "ort"): Answer(),
    ("runner", "torch"): Answer(),
    ("runner", "trt"): Answer(),
    ("flavor", "tensorrt"): Answer(facts={"version": "10.3"}),
    ("flavor", "tensorrt-rtx"): Answer(facts={"version": "1.7"}),
    ("plugin", "tensorrt"): Answer(facts={"library": "/x/libssd_export_plugin.so"}),
    ("gpu",): Answer(facts={"capability": "9.0", "cuda": "13.0"}),
    ("cuda_python",): Answer(),
}
Machine = Callable[..., Examination]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Examines a machine that has everything but these (names of probes joined by a space)."""

    def make(*lacking: str) -> Examination:
        def answer(probe: Callable, *arguments: str) -> Answer:
            name = (probe.__name__, *arguments)
            return Answer("it is missing") if " ".join(name) in lacking else ALL[name]

        monkeypatch.setattr(module, "ask", answer)
        return examine()

    return make


def working(examination: Examination) -> list[str]:
    return [ability.name for ability in examination.abilities if ability.works]


def test_with_everything_there_everything_works(machine: Machine) -> None:
    found = machine()
    assert working(found) == list(ABILITIES) and found.exit_code(ABILITIES) == 0
    assert {one.name: one.says for one in found.abilities}["ort"] == "on cpu and cuda"
    states = {one.name: one.state for one in found.findings}
    assert (
        states["operators"]
        == states[CPU]
        == states[CUDA]
        == states["plugin library"]
        == states["GPU"]
        == "ok"
    )


def test_operators_that_do_not_load_and_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no fault of the runner: it has others."""
    broken = machine("operators")
    assert [one.state for one in broken.findings if one.name == "operators"] == ["broken"]
    monkeypatch.setitem(ALL, ("operators",), Answer(facts={"path": ""}))
    absent = machine()
    assert [one.state for one in absent.findings if one.name == "operators"] == ["absent"]
    assert "ort" in working(broken) and "ort" in working(absent)


@pytest.mark.parametrize(
    "lacking, lost, code",
    [
        (["exporter"], ["export"], 1),
        (["flavor tensorrt-rtx"], [], 0),  # TensorRT builds beside its GPU
        (["flavor tensorrt-rtx", "flavor tensorrt"], ["build-engine", "trt"], 2 + 16),
        (["flavor tensorrt-rtx", "gpu"], ["build-engine", "trt"], 2 + 16),
        (["gpu"], ["trt"], 16),
        (["cuda_python"], ["trt"], 16),
        ([f"provider {CPU}"], ["ort"], 4),
        (["runner ort", "onnxruntime"], ["ort"], 4),
        ([f"provider {CUDA}"], [], 0),
        (["torch"], ["torch"], 8),
        (["runner torch", "torch", "exporter"], ["export", "torch"], 1 + 8),
    ],
    ids=str,
)
def test_what_is_lost_with_a_piece(
    machine: Machine, lacking: list[str], lost: list[str], code: int
) -> None:
    found = machine(*lacking)
    assert working(found) == [name for name in ABILITIES if name not in lost]
    assert found.exit_code(ABILITIES) == (32 + code if code else 0)
    for ability in found.abilities:
        assert ability.works or (ability.problem and ability.fix), ability
    assert found.exit_code(tuple(name for name in ABILITIES if name not in lost)) == 0


def test_a_provider_that_does_not_start_is_broken_only_beside_a_gpu(machine: Machine) -> None:
    def state(*lacking: str) -> str:
        (found,) = (one for one in machine(*lacking).findings if one.name == CUDA)
        return found.state

    assert state(f"provider {CUDA}") == "broken"
    assert state(f"provider {CUDA}", "gpu") == "absent"


def test_old_and_missing_packages_are_named_with_the_command(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.doctor.packages import Package

    listed = [Package("numpy", "", "1.26", "1.20"), Package("rich", "", "13.7", "")]
    monkeypatch.setattr(module.packages, "packages", lambda extras: listed)
    monkeypatch.setattr(module.packages, "clashing", lambda: ["onnxruntime", "onnxruntime-gpu"])
    found = {one.name: one for one in machine().findings}
    assert found["numpy"].state == "broken" and 'install "numpy>=1.26"' in found["numpy"].fix
    assert "everything needs it" in found["rich"].says and "install rich" in found["rich"].fix
    assert "uninstall" in found["onnxruntime and onnxruntime-gpu"].fix
