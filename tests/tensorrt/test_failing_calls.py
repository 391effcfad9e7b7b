"""Whatever call of the driver fails, and whenever: the error says which, and nothing of the device
is kept.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from ssd_export.errors import UserError
from ssd_export.runtime.prompt_batch import PromptBatches
from ssd_export.sampling import Sampling
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.engine_files import find_engines
from ssd_export.tensorrt.runner import TrtRunner
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.cuda_double import CudaDouble, CUresult
from tests.tensorrt.engine_doubles import write_engines
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, found_doubles
from tests.tensorrt.trt_double import CAPABILITY

pytestmark = pytest.mark.slow
CALLS = {
    "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate",
    "cuMemGetInfo", "cuMemAlloc", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync",
    "cuMemcpy2DAsync", "cuMemsetD8Async", "cuModuleLoadData", "cuModuleGetFunction",
    "cuLaunchKernel", "cuStreamSynchronize", "cuGraphLaunch",
}  # fmt: skip


class Fails:
    """Makes the n-th call of a function of the driver fail, and counts the calls of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.place, self.counts = "", 0, Counter[str]()
        for name in vars(CudaDouble):
            if name.startswith("cu") and callable(getattr(CudaDouble, name)):
                monkeypatch.setattr(
                    CudaDouble, name, self._counted(name, getattr(CudaDouble, name))
                )

    def _counted(self, name: str, real: object) -> object:
        def call(double: CudaDouble, *arguments: object) -> tuple[object, ...]:
            self.counts[name] += 1
            if (name, self.counts[name]) == (self.name, self.place):
                if name == "cuStreamEndCapture":
                    real(double, *arguments)  # an invalid capture ends all the same
                return (CUresult.CUDA_ERROR_INVALID_HANDLE, None)
            return real(double, *arguments)

        return call


def few_steps(made: Doubles) -> None:
    """Opens a runner, takes some steps of an image, decodes it, and closes the runner."""
    device = CudaDevice(made.cuda)
    with closing(TrtRunner(made.bundle, find_engines(made.bundle, CAPABILITY), device)) as runner:
        batches = PromptBatches.from_bundle(made.bundle)
        runner.prefill(batches([PROMPTS[0]] * 3, Sampling(), seed=1))
        runner.decode_row(range(1, 4), {2})
        runner.decode_row(range(4, 5), ())
        runner.decode_image(runner.tokens()[:1])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copied_bundle(tmp_path_factory.mktemp("failing"))
    write_engines(path, images=(1, 1, 4), flavor="tensorrt-rtx")
    return path


def test_without_a_failure_all_is_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = found_doubles(monkeypatch, path)
    few_steps(made)
    assert_given_back(made)


def assert_given_back(made: Doubles) -> None:
    cuda = made.cuda
    left = (cuda.used_bytes, cuda.alive, cuda.faults, cuda.graphs, cuda._queued, cuda._modules)
    assert left == (0, [], [], {}, {}, set()) and cuda._retained == 0, left


@pytest.mark.parametrize("name", sorted(CALLS))
def test_nothing_is_kept_whichever_call_fails(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = Fails(monkeypatch)
    few_steps(found_doubles(monkeypatch, path))
    total = fails.counts[name]
    assert total, "no such call any more"
    for place in sorted({1, min(2, total), total // 2 + 1, total}):
        fails.name, fails.place, fails.counts = name, place, Counter()
        made = found_doubles(monkeypatch, path)
        told = pytest.raises((RuntimeError, UserError), match=name)
        if name == "cuMemcpyDtoDAsync" and place > 2:  # a step that is captured: queued without
            told = pytest.warns(RuntimeWarning, match=f"cannot be captured .{name}")
        with told:
            few_steps(made)
        assert_given_back(made)
