"""gpu_report without a GPU says so; its parts run over doubles of CUDA and TensorRT, a wrong result
is seen, and what was not run is told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu_engines, gpu_kernel, gpu_report, gpu_runner, gpu_speed
from benchmarks.gpu_part import FAILED, OK, UNFINISHED, Task, exit_code, run_part
from benchmarks.gpu_time import Rates
from benchmarks.kernel_check import CASES, KernelCase, check_kernel
from ssd_export.cache.attention import decode_attention
from ssd_export.cache.state import GroupState
from ssd_export.errors import UserError
from ssd_export.export import temporary_bundle as exported
from ssd_export.policy.table import HeadGroup
from ssd_export.runtime.torch_batch import fill_on_host
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.tensorrt import build as engine
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt import runner as trt_runner
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.engine_files import find_engines
from tests.kernels.interpreted import interpreted_lines
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles
from tests.tensorrt.trt_double import CAPABILITY, ContextDouble

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RATES = dict(read_bandwidth=1e12, copy_bandwidth=2e12, matrix_rate=1e14, dtype="float16", threads=0)
GPU_RATES = Rates(1e12, 2e12, 1e14)
SMALL = tuple(case for case in CASES if case.name in ("four sinks", "odd sizes", "decay 0"))
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install ssd-export[kernels]"
)


def test_without_a_gpu_every_task_is_listed_as_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "gpu_here", lambda: None)
    out = tmp_path / "gpu.json"
    assert gpu_report.main(["--out", str(out)]) == UNFINISHED
    said, found = capsys.readouterr(), json.loads(out.read_text())["results"]
    no_gpu = "no NVIDIA GPU here, or no driver for it"
    names = {
        (part, task.name) for part in gpu_report.PARTS for task in gpu_report.part_tasks(part, 90)
    }
    assert len(names) > 10
    assert set(said.err.splitlines()) == {f"not run: {p}: {name} ({no_gpu})" for p, name in names}
    assert set(found["unfinished"]) == {f"{part}: {name} ({no_gpu})" for part, name in names}
    rows = found["tables"][0]["rows"]
    assert {tuple(row[:3]) for row in rows} == {(*name, "not run") for name in names}
    assert json.loads(said.out) == found["tables"]


def test_without_a_gpu_results_of_another_machine_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "gpu_here", lambda: 90)
    monkeypatch.setattr(gpu_report, "part_tasks", lambda *part: [GOOD])
    out = tmp_path / "gpu.json"
    gpu_report.main(["--out", str(out), "--part", "kernel"])
    before = json.loads(out.read_text())["results"]["parts"]["kernel"]
    monkeypatch.setattr(gpu_report, "gpu_here", lambda: None)
    assert gpu_report.main(["--out", str(out), "--part", "kernel"]) == UNFINISHED
    assert json.loads(out.read_text())["results"]["parts"]["kernel"] == before
    assert "not run: kernel: good (no NVIDIA GPU" in capsys.readouterr().err


def not_here() -> dict:
    raise UserError("compute-sanitizer is not installed")


def breaks() -> dict:
    raise RuntimeError("cuGraphLaunch: an illegal memory access was encountered")


GOOD, ABSENT = Task("good", lambda: {"ok": True, "summary": "fine"}, 1), Task("absent", not_here, 1)
BROKEN = Task("broken", breaks, 1)


def test_a_task_that_would_not_end_in_time_is_not_begun() -> None:
    clock, results, saved = iter([0, 0, 7, 7, 7]), {}, []
    tasks = [GOOD, Task("long", lambda: pytest.fail("begun"), 4), Task("short", lambda: {}, 3)]
    times = lambda: next(clock, 7)  # noqa: E731
    run_part(tasks, results, 10, lambda: saved.append(list(results)), lambda text: None, times)
    assert results["long"]["not_run"] == "about 4 s, 3 s left; give --minutes"
    assert "not_run" not in results["short"] and exit_code(results) == UNFINISHED
    assert saved == [["good"], ["good", "long"], ["good", "long", "short"]]


@pytest.mark.parametrize(
    ("tasks", "code"),
    [
        ([GOOD], OK),
        ([GOOD, ABSENT], UNFINISHED),
        ([GOOD, BROKEN, ABSENT], FAILED),
        ([Task("wrong", lambda: {"ok": False, "failures": ["slots differ"]}, 1)], FAILED),
        ([], UNFINISHED),
    ],
)
def test_the_exit_code_says_what_was_not_run(
    tasks: list[Task],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "gpu_here", lambda: 90)
    monkeypatch.setattr(gpu_report, "part_tasks", lambda part, capability: list(tasks))
    out = tmp_path / "gpu.json"
    assert gpu_report.main(["--out", str(out), "--part", "kernel"]) == code
    said = capsys.readouterr().err
    assert ("not run: kernel: absent (compute-sanitizer is not" in said) == (ABSENT in tasks)
    assert "not run: runner: not begun" in said
    if tasks:
        found = json.loads(out.read_text())["results"]
        assert set(found["parts"]["kernel"]) == {task.name for task in tasks}
        results = {row[1]: row[2] for row in found["tables"][0]["rows"]}
        assert results.get("broken", "FAILED") == "FAILED" and results.get("good", "ok") == "ok"


def test_the_file_is_written_after_every_task_and_parts_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "gpu.json", []

    def look() -> dict:
        seen.append(sorted(json.loads(out.read_text())["results"]["parts"]["kernel"]))
        return {}

    monkeypatch.setattr(gpu_report, "gpu_here", lambda: 90)
    monkeypatch.setattr(gpu_report, "part_tasks", lambda *part: [GOOD, Task("look", look, 1)])
    gpu_report.main(["--out", str(out), "--part", "kernel"])
    assert seen == [["good"]]
    monkeypatch.setattr(gpu_report, "part_tasks", lambda *part: [ABSENT])
    assert gpu_report.main(["--out", str(out), "--part", "runner"]) == UNFINISHED
    found = json.loads(out.read_text())["results"]
    assert sorted(found["parts"]) == ["kernel", "runner"]
    assert found["unfinished"] == [
        "runner: absent (compute-sanitizer is not installed)",
        "engines: not begun",
    ]


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from benchmarks import gpu_report
from benchmarks.gpu_part import ended
for part in gpu_report.PARTS:
    tasks = gpu_report.part_tasks(part, 90)
    print(part, len(tasks), ended(tasks[0].run).get("not_run") if part == "engines" else "")
"""
ABSENT_THERE = {
    *("click", "huggingface_hub", "matplotlib", "msgspec", "onnx", "onnx_ir", "onnxscript", "PIL"),
    *("rich", "safetensors", "tensorrt", "tensorrt_rtx", "tokenizers", "transformers"),
}


@needs_triton
def test_two_parts_need_torch_triton_and_numpy_alone() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BARE.format(blocked=sorted(ABSENT_THERE))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kernel, runner, engines = run.stdout.splitlines()
    assert int(kernel.split()[1]) > 20 and int(runner.split()[1]) == 16
    assert engines.startswith("engines 3 No module named")


def test_no_part_is_planned_for_more_than_eight_minutes() -> None:
    for part in ("kernel", "runner"):
        tasks = gpu_report.part_tasks(part, 90)
        assert 0 < sum(task.seconds for task in tasks) <= 60 * gpu_report.MINUTES, part


class HostDevice:
    """A CudaDevice over host memory whose kernels are the reference, right or with a fault: the
    first of a split keeps what the second gives.
    """

    def __init__(self, case: KernelCase, fault: str = "") -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.case, self.fault, self.captures = case, fault, 0
        self.launches: list[str] = []
        self.kept: tuple[torch.Tensor, ...] = ()

    def load_kernel(self, image: bytes, entry: str) -> str:
        assert image.startswith(b"\x7fELF") and entry in KERNEL_NAMES
        return entry

    def unload_kernel(self, kernel: str) -> None:
        pass

    def allocate(self, num_bytes: int) -> int:
        return 256 * (1 + max((key // 256 for key in self.memory), default=0))

    def upload(self, address: int, array: np.ndarray) -> None:
        self.memory[address] = array.copy()

    def download(self, address: int, shape: tuple, dtype: Any) -> np.ndarray:
        return self.memory[address].copy()

    def free(self, address: int) -> None:
        del self.memory[address]

    def capture(self, work: Any) -> Any:
        self.captures += 1
        return work

    def launch(self, graph: Any) -> None:
        graph()

    def destroy(self, graph: Any) -> None:
        pass

    def launch_kernel(
        self, kernel: str, grid: tuple, threads: int, values: tuple, types: tuple, shared: int
    ) -> None:
        self.launches.append(kernel)
        is_part = kernel == "attend_split_kernel"
        assert grid == (16, gpu_kernel.IMAGE_SPLITS if is_part else 1)
        assert threads == 128 and 0 < shared <= 48 * 1024
        assert len(values) == len(types) and values[-2:] == (0, 0)
        if kernel == "combine_splits_kernel":
            self.give(values[0], values[3], values[12])
            return
        self.attend([self.memory[values[place]] for place in (0, 1, 2, 3, 4, 5, 8, 11, 14)])
        if not is_part:
            self.give(values[11], values[14], values[18])

    def attend(self, memory: list[np.ndarray]) -> None:
        """Writes keys and values, and keeps positions, scores and out."""
        arrays = [torch.from_numpy(array) for array in memory]
        if arrays[0].dtype == torch.int16:
            arrays = [a.view(torch.bfloat16) if a.dtype == torch.int16 else a for a in arrays]
        query, key, value, position, lengths, *caches = arrays
        kept = caches[2].clone(), caches[3].clone()
        wide = GroupState(caches[0].float(), caches[1].float(), *kept)
        token = [part.float() for part in (query, key, value)]
        out = decode_attention(*token, wide, self.case.policy, lengths, position)
        caches[0].copy_(wide.key)
        caches[1].copy_(wide.value)
        self.kept = (*kept, out.to(query.dtype))

    def give(self, position: int, score: int, out: int) -> None:
        """Writes what was kept to these addresses."""
        positions, scores, attended = self.kept
        steps = self.captures * 2 * 1.5
        if self.fault == "eager and captured differ" and steps < len(self.launches):
            attended = attended + 0.1
        if self.fault == "slots":
            positions[0, 0] = positions[0, 0].flip(0)
        is_bfloat16 = attended.dtype == torch.bfloat16
        raw = attended.view(torch.int16) if is_bfloat16 else attended
        for address, tensor in ((position, positions), (score, scores), (out, raw)):
            self.memory[address][...] = tensor.numpy()


KERNEL_NAMES = {"decode_layer_kernel", "attend_split_kernel", "combine_splits_kernel"}


@needs_triton
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_image_is_launched_by_the_driver_and_compared(dtype: str) -> None:
    device = HostDevice(gpu_kernel.IMAGE_CASE)
    result = gpu_kernel.check_image(80, dtype, device)
    assert result["ok"], result["failures"]
    num_steps = 2 * gpu_kernel.IMAGE_STEPS
    assert device.captures == num_steps and len(device.launches) == 3 * num_steps
    assert set(device.launches) == KERNEL_NAMES
    assert not device.memory, "all of it is freed"


@needs_triton
@pytest.mark.parametrize("fault", ["slots", "eager and captured differ"])
def test_a_wrong_image_is_seen(fault: str) -> None:
    result = gpu_kernel.check_image(80, "float16", HostDevice(gpu_kernel.IMAGE_CASE, fault))
    assert not result["ok"] and result["failures"]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_noise_is_compared_bit_by_bit(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(noise: torch.Tensor, images: Any, steps: range) -> None:
        fill_on_host(noise, images, steps)
        noise[3, 1, 7] += 1e-6 * is_wrong

    monkeypatch.setattr("ssd_export.runtime.torch_batch.fill_on_gpu", fill)
    result = gpu_kernel.check_noise("cpu")
    assert result["ok"] is not is_wrong
    assert result["failures"] == (["1 of 786432 numbers differ"] if is_wrong else [])


def test_the_kernel_is_timed_on_random_caches_that_no_second_level_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []
    seen: list[GroupState] = []

    def median(works: list[Any]) -> float:
        for work in works:
            work()
        timed.append(len(works))
        return float(len(timed))

    monkeypatch.setattr(gpu_kernel, "median_ms", median)
    monkeypatch.setattr(gpu_kernel, "COLD_BYTES", 5 << 20)

    def launch(
        variant: Any, token: list, state: GroupState, group: HeadGroup, lengths: Any
    ) -> None:
        seen.append(state)

    result = gpu_kernel.time_kernel(1, 64, GPU_RATES, "cpu", gpu_kernel.VARIANTS[:2], launch)
    assert timed == [5, 5, 5] and len({id(state) for state in seen}) == 5
    assert all(state.key.float().std() > 0.9 and (state.position >= 0).all() for state in seen)
    assert result["bytes"] == 2 * 2 * 16 * 64 * 128 * 2
    assert result["bound_ms"] == pytest.approx(result["bytes"] / 1e9)
    rows = gpu_kernel.table_rows({"kernel, 1 images, 64 slots": result})
    assert rows == [
        ["1 images, 64 slots", "1.0000", "2.0000 (32 slots, 3 stages, 4 warps)", "3.0000", "0.0010"]
        + ["0%"]
    ]


def test_the_first_variant_is_the_kernel_s_own() -> None:
    kernel = pytest.importorskip(
        "ssd_export.kernels.constants", reason="needs Triton: ssd-export[kernels]"
    )
    own = kernel.constants(gpu_kernel.HEAD_DIM, 640, 2)
    assert gpu_kernel.VARIANTS[0] == gpu_kernel.Variant(
        own["BLOCK_SLOTS"], own["NUM_STAGES"], kernel.NUM_WARPS
    )


SMALL_MODEL = replace(
    gpu_runner.PUBLISHED["janus-pro-1b"],
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=32,
    codebook_size=64,
)


@pytest.fixture
def timed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def elapsed(work: Any) -> float:
        work()
        return 96.0

    monkeypatch.setattr(gpu_runner, "elapsed_ms", elapsed)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 << 20)


def test_the_runner_s_step_is_timed_beside_its_bound(timed_by_hand: None) -> None:
    model = gpu_runner.random_model(SMALL_MODEL, "cpu", torch.float32)
    result = gpu_runner.measure(model, "small", ("h2o", 0.2), 2, GPU_RATES, "cpu")
    assert result["ok"] and result["step"]["ms_per_token"] == 2.0
    row = gpu_runner.table_rows({"one": result, "two": {"not_run": "no time"}})
    assert len(row) == 1 and row[0][:5] == ["small", "h2o 0.2", "2", "2.000", "1,000"]
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 32) + 32 * 32 + 32 * 64 + 8 * 32 + 32 * 32
    moved = 4 * matrices + result["step"]["cache_bytes"]
    assert result["step"]["bound_ms"] == pytest.approx(1000 * moved / 1e12)


def test_a_batch_that_does_not_fit_ends_alone(
    timed_by_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefill(self: TorchRunner, batch: Any) -> None:
        raise torch.cuda.OutOfMemoryError("Tried to allocate 80 GiB\nmore")

    monkeypatch.setattr(TorchRunner, "prefill", prefill)
    model = gpu_runner.random_model(SMALL_MODEL, "cpu", torch.float32)
    result = gpu_runner.measure(model, "small", ("full", 1.0), 2, GPU_RATES, "cpu")
    assert result["out_of_memory"] == "Tried to allocate 80 GiB"
    assert gpu_report.checks_table({"runner": {"one": result}})["rows"] == [
        ["runner", "one", "ok", "does not fit: Tried to allocate 80 GiB"]
    ]


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
    result = gpu_engines.check_tokens("off")
    assert result["ok"] and result["same_tokens"] == 1 and "step 2 nodes" in result["graphs"]
    names = [rung["name"] for rung in result["rungs"]]
    assert names[-4:] == ["logits", "tokens", "image", "operators"]


def test_an_engine_that_computes_something_else_is_seen(
    made: Doubles, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ContextDouble._run

    def with_a_fault(self: ContextDouble, views: dict) -> None:
        run(self, views)
        if "next_step" in views and views["step"][0] == 5:
            views["past_key_values.1.0.key"][0, 0, 3] += 0.5

    monkeypatch.setattr(ContextDouble, "_run", with_a_fault)
    result = gpu_engines.check_tokens("off")
    rows = gpu_report.checks_table({"engines": {"tokens": result}})["rows"]
    assert not result["ok"] and rows == [["engines", "tokens", "FAILED", result["failures"][0]]]


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


def test_a_sanitizer_that_is_not_installed_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernel.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_kernel, "SANITIZER_PLACES", ())
    results: dict[str, dict] = {}
    task = Task("memcheck", lambda: gpu_kernel.sanitize("memcheck"), 1)
    run_part([task], results, 1e9, lambda: None, lambda text: None)
    assert "compute-sanitizer is not installed" in results["memcheck"]["not_run"]


@pytest.mark.parametrize("fault", ["none", "out", "score", "slot"])
def test_the_kernel_check_sees_a_wrong_kernel(fault: str) -> None:
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

    result = check_kernel("cpu", SMALL, lambda: {"wrong": kernel})
    assert result["ok"] == (fault == "none"), result["failures"][:3]
    assert result["evicted"] > 0 and result["ties"] == 0


def test_the_kernel_passes_interpreted_on_the_cpu() -> None:
    """One head of a case, which takes seconds: tests/kernels has the others."""
    script = """
import json
from dataclasses import replace
from benchmarks.kernel_check import CASES, check_kernel, kernels

(case,) = [case for case in CASES if case.name == "odd sizes"]
case = replace(case, group=replace(case.group, num_heads=1))
result = check_kernel("cpu", (case,), lambda: {"parts": list(kernels().values())[-1]})
print(json.dumps(result))
"""
    (result,) = interpreted_lines("-c", script)
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
