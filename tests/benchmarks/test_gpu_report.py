"""gpu_report without a GPU says so; its parts run over the doubles of CUDA and TensorRT, and a
wrong result is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_report, gpu_speed
from benchmarks.kernel_check import CASES, check_kernel
from ssd_export.cache.attention import decode_attention
from ssd_export.cache.state import GroupState
from ssd_export.export import temporary_bundle as exported
from ssd_export.tensorrt import build as engine
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt import runner as trt_runner
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.engine_files import find_engines
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles
from tests.tensorrt.trt_double import CAPABILITY, ContextDouble

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RATES = dict(read_bandwidth=1e12, copy_bandwidth=2e12, matrix_rate=1e14, dtype="float16", threads=0)
SMALL = tuple(case for case in CASES if case.name in ("four sinks", "odd sizes", "decay 0"))


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "gpu_here", lambda: None)
    run = CliRunner().invoke(gpu_report.main, ["--out", str(tmp_path / "gpu.json")])
    assert (
        run.exit_code == 1
        and run.output == "error: no NVIDIA GPU here, or no driver for it: nothing was run\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    """Engines as a build would leave them, found by everybody who opens the device."""
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    opened = lambda bundle: (find_engines(bundle, CAPABILITY), CudaDevice(made.cuda))  # noqa: E731
    for module in (trt_runner, gpu_speed):
        monkeypatch.setattr(module, "open_device", opened)

    @contextmanager
    def bundle_at_hand(choice: object) -> Iterator[Path]:
        yield made.path

    monkeypatch.setattr(exported, "temporary_bundle", bundle_at_hand)
    monkeypatch.setattr(build_plan, "plan_build", lambda spec: spec)
    monkeypatch.setattr(engine, "build_engines", lambda plan: {})
    return made


def test_tokens_equal_those_of_onnxruntime(made: Doubles) -> None:
    result = gpu_report.check_tokens("off")
    assert result["ok"] and result["same_tokens"] == 1 and "step 2 nodes" in result["graphs"]
    assert [rung["name"] for rung in result["rungs"]][-3:] == ["logits", "tokens", "image"]


def test_an_engine_that_computes_something_else_is_seen(
    made: Doubles, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ContextDouble._run

    def with_a_fault(self: ContextDouble, views: dict) -> None:
        run(self, views)
        if "next_step" in views and views["step"][0] == 5:
            views["past_key_values.1.0.key"][0, 0, 3] += 0.5

    monkeypatch.setattr(ContextDouble, "_run", with_a_fault)
    result = gpu_report.check_tokens("off")
    assert (
        not result["ok"]
        and result["failures"]
        and gpu_report.checks_table(
            dict.fromkeys(
                ("kernel", "memcheck", "racecheck", "tokens_plugin_on", "tokens_plugin_off"), result
            )
        )["rows"][0][1]
        == "FAILED"
    )


def test_speed_is_measured_for_every_batch_that_can_be_generated(made: Doubles) -> None:
    said: list[str] = []
    speeds = list(gpu_speed.speeds_of(made.bundle, (1, 2, 9), said.append))
    assert [speed.batch for speed in speeds] == [1, 2]
    assert "batch 9 not run (the engine generates 1 to 4 images at once" in said[-1]
    assert all(speed.seconds > 0 and speed.memory["caches"] > 0 for speed in speeds)
    assert speeds[0].tokens_per_second == pytest.approx(1000 / speeds[0].ms_per_token)
    with_rates, without = (
        gpu_speed.speed_table("tiny", speeds, rates)["rows"] for rates in (RATES, None)
    )
    assert float(with_rates[0][5]) < speeds[0].ms_per_token and without[0][5] is None
    assert "step 2 nodes" in with_rates[0][-1]


def test_a_report_keeps_what_was_measured_when_a_part_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = dict(engines=1, weights=1, buffers=1, caches=1, graphs=1)
    cost = dict(weight_bytes=10**9, cache_bytes=0, operations=1)
    speed = gpu_speed.Speed("full 1", True, 1, 575, 0.575, 1.0, 1.0, memory, "1", cost)

    def breaks(shape: str, batches: tuple[int, ...], say: object) -> Iterator[gpu_speed.Speed]:
        yield speed
        raise RuntimeError("cuGraphLaunch: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_report, "measure_speed", breaks)
    monkeypatch.setattr(gpu_report, "check_kernel_here", lambda: {"ok": True, "summary": "fine"})
    monkeypatch.setattr(
        gpu_report,
        "sanitize",
        lambda tool: (_ for _ in ()).throw(gpu_report.UserError("not installed")),
    )
    monkeypatch.setattr(gpu_report, "check_tokens", lambda plugin: {"ok": True, "summary": "fine"})
    monkeypatch.setattr(gpu_report, "rates_here", lambda: dict(RATES))
    measured = json.loads(json.dumps(gpu_report.report("tiny", (1,))))["results"]
    assert not measured["ok"] and measured["speed"]["failures"] == [
        "RuntimeError: cuGraphLaunch: an illegal memory access was encountered"
    ]
    assert measured["figures"] == {"tokens_per_second_full_1_1": "1,000"}
    checks, speeds = measured["tables"]
    assert [row[1] for row in checks["rows"]] == [
        "ok",
        "not run",
        "not run",
        "ok",
        "ok",
    ] and speeds["rows"][0][3] == "1.000"


def test_a_sanitizer_that_is_not_installed_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_report, "SANITIZER_PLACES", ())
    assert (
        "compute-sanitizer is not installed"
        in gpu_report.attempt("memcheck", lambda: gpu_report.sanitize("memcheck"))["not_run"]
    )


@pytest.mark.parametrize("fault", ["none", "out", "score", "slot"])
def test_the_kernel_check_sees_a_wrong_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in the kernel's place, right and wrong."""

    def kernel(query, key, value, state, policy, lengths, position):
        wide = [part.float() for part in (query, key, value)]
        held = GroupState(state.key.float(), state.value.float(), state.position, state.score)
        out = decode_attention(*wide, held, policy, lengths, position)
        state.key.copy_(held.key)
        state.value.copy_(held.value)
        if fault == "score" and state.score is not None:
            state.score += 0.01
        if fault == "slot":
            state.position[0, 0] = state.position[0, 0].flip(0)
        return (out + 0.1 * (fault == "out")).to(query.dtype)

    monkeypatch.setitem(
        sys.modules, "ssd_export.kernels.decode_attention", SimpleNamespace(decode_attention=kernel)
    )
    result = check_kernel("cpu", SMALL)
    assert result["ok"] == (fault == "none"), result["failures"][:3]
    assert result["evicted"] > 0 and result["ties"] == 0


@pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install ssd-export[kernels]"
)
def test_the_kernel_passes_interpreted_on_the_cpu() -> None:
    script = (
        "import json, torch; torch.set_num_threads(1)\nfrom benchmarks.kernel_check import"
        " CASES, check_kernel\nprint(json.dumps(check_kernel('cpu', tuple(case for case in CASES if"
        " case.name == 'odd sizes'))))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["ok"] and result["evicted"] > 0 and result["steps"] == 12


def test_the_kernel_check_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "kernel_check needs a GPU and torch for CUDA" in run.stderr
