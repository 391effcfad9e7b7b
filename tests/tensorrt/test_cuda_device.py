"""The names and arguments of CUDA and TensorRT calls, checked against the real packages without a
GPU.

cuda-python converts all arguments before it looks for the driver, so a wrong name or type is told
apart from a missing driver. TensorRT-RTX loads and tells its signatures; to load an engine it needs
a driver.
"""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.engine import TrtEngine, open_runtime
from ssd_export.tensorrt.flavors import load_flavor
from ssd_export.tensorrt.target import gpu_here
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt import trt_double
from tests.tensorrt.cuda_double import CUDA_MEMCPY2D, ENUMS, CudaDouble
from tests.tensorrt.trt_bundles import copied_bundle, doubles

NEEDS_CUDA_PYTHON = pytest.mark.skipif(
    find_spec("cuda") is None or find_spec("cuda.bindings") is None,
    reason="needs cuda-python: pip install ssd-export[rtx]",
)
NEEDS_RTX = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
NO_GPU_HERE = pytest.mark.skipif(
    gpu_here() is not None, reason="needs a machine without a GPU, where no call has an effect"
)
USED = {
    "Runtime": trt_double.RuntimeDouble,
    "ICudaEngine": trt_double.EngineDouble,
    "IExecutionContext": trt_double.ContextDouble,
    "IRuntimeConfig": trt_double.RuntimeConfigDouble,
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The first call of every driver function while an image is generated, and of what only errors
    call.
    """
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    with made.generator() as generator:
        generator(PROMPTS[:1])
    found = {}
    for name, arguments in made.cuda.calls:
        found.setdefault(name, arguments)
    return found | {"cuGetErrorString": (ENUMS[0].CUDA_SUCCESS,)}


@NEEDS_CUDA_PYTHON
@NO_GPU_HERE
def test_every_call_is_one_that_cuda_python_takes(calls: dict[str, tuple[Any, ...]]) -> None:
    from cuda.bindings import driver

    assert len(calls) > 20
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match="driver library|Failed to dlopen|not found"):
            getattr(driver, name)(*[real_value(driver, argument) for argument in arguments])
            pytest.fail(f"{name} worked without a driver")
    with pytest.raises(TypeError):
        driver.cuMemAlloc("many")


def real_value(driver: Any, value: Any) -> Any:
    """The real package's enum member or structure for the double's."""
    if isinstance(value, ENUMS):
        return getattr(getattr(driver, type(value).__name__), value.name)
    if isinstance(value, CUDA_MEMCPY2D):
        real = driver.CUDA_MEMCPY2D()
        for field, number in vars(value).items():
            setattr(real, field, real_value(driver, number))
        return real
    return value


@NEEDS_CUDA_PYTHON
@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_numbers_of_enums_are_cuda_s(enum: Any) -> None:
    from cuda.bindings import driver

    real = getattr(driver, enum.__name__)
    assert {member.name: int(member) for member in enum} == {
        member.name: int(getattr(real, member.name)) for member in enum
    }


@NEEDS_RTX
@pytest.mark.parametrize("name", USED)
def test_tensorrt_has_what_is_called(name: str) -> None:
    real = getattr(load_flavor("tensorrt-rtx").trt, name)
    for member, double in inspect.getmembers(USED[name]):
        if member.startswith("_") or member in (
            "strategy",
            "trt",
            "graph",
            "spec",
            "weights",
            "tensors",
        ):
            continue
        assert hasattr(real, member), f"{name}.{member}"
        if inspect.isfunction(double):
            wanted = list(inspect.signature(double).parameters)[1:]
            given = re.findall(
                rf"{member}\(self: [^,)]+((?:, [^)]*)?)\)", getattr(real, member).__doc__ or ""
            )
            assert len(wanted) in {len(re.findall(r", (\w+): ", text)) for text in given}, (
                f"{name}.{member}: {given}"
            )


@NEEDS_RTX
def test_tensorrt_has_the_enums_that_are_used() -> None:
    real = load_flavor("tensorrt-rtx").trt
    for enum in (
        trt_double.TensorLocation,
        trt_double.ExecutionContextAllocationStrategy,
        trt_double.DataType,
        trt_double.DynamicShapesKernelSpecializationStrategy,
        trt_double.CudaGraphStrategy,
    ):
        assert set(enum.__members__) <= set(getattr(real, enum.__name__).__members__), enum.__name__


@NEEDS_RTX
@NO_GPU_HERE
def test_tensorrt_reads_a_mapped_file_and_says_what_it_lacks(tmp_path: Path) -> None:
    flavor, path = load_flavor("tensorrt-rtx"), tmp_path / "some.engine"
    path.write_bytes(b"ftrt" + bytes(4096))
    with pytest.raises(
        UserError, match=r"TensorRT cannot load .*some\.engine \(.*\); build the engines again"
    ) as refused:
        TrtEngine(
            flavor,
            open_runtime(flavor, False).deserialize_cuda_engine,
            CudaDevice(CudaDouble()),
            path,
            GraphSpec("some", (), ()),
            GraphSpec("some", (), ()),
            {},
            {},
        )
    assert "\n" not in str(refused.value)


def test_a_capture_refuses_what_waits() -> None:
    cuda = CudaDouble()
    device = CudaDevice(cuda)
    address = device.allocate(256)
    with pytest.raises(RuntimeError, match="STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: device.download(address, (4,), np.uint8))
    assert not cuda.graphs, "what was captured until then is not kept"
    graph = device.capture(lambda: device.copy(address + 128, address, 4))
    device.upload(address, np.arange(4, dtype=np.uint8))
    assert device.download(address + 128, (4,), np.uint8).tolist() == [0xCD] * 4, (
        "captured, not run"
    )
    device.launch(graph)
    assert device.download(address + 128, (4,), np.uint8).tolist() == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="outside of device memory"):
        device.copy(address + 200, address, 100)
    with pytest.raises(UserError, match="the GPU gave no 9,999,999,999 bytes"):
        device.allocate(9_999_999_999)
