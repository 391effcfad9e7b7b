"""One GPU and one stream: memory, copies, captured graphs. The few calls of the CUDA driver that
the trt runner makes.

`cuda.bindings.driver` (cuda-python) opens the driver's own library, so nothing else of CUDA has to
be installed. The module is an argument: tests run the same calls over host memory
(tests/tensorrt/trt_double.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssd_export.errors import UserError

ALIGNMENT = 256  # bytes, of every buffer: what TensorRT asks of inputs and scratch memory
NO_GPU = (
    "this machine has no NVIDIA GPU, or no driver for it; use the onnxruntime runner (--runner"
    " ort), which needs neither"
)


@dataclass(frozen=True)
class CudaGraph:
    """Work that was captured once. executable: the driver's handle."""

    executable: Any
    num_nodes: int


@dataclass(frozen=True)
class Kernel:
    """A function of a loaded module: the driver's handles."""

    module: Any
    function: Any


def open_driver() -> Any:
    """cuda-python's driver module. Raises: UserError where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError(
            f'the trt runner needs cuda-python ({error}): pip install "cuda-bindings>=12.8", of the'
            " major version of CUDA that nvidia-smi names"
        ) from error
    return driver


class CudaDevice:
    """The first GPU. All is queued on one stream in the order of the calls; `synchronize` and
    `download` wait.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", 0)
        except RuntimeError as error:  # also what cuda-python raises where there is no driver
            raise UserError(f"{NO_GPU} ({error})") from error
        self._context = self._call(
            "cuDevicePrimaryCtxRetain", self._device
        )  # the one that TensorRT uses
        self._sources: list[np.ndarray] = []  # arrays that the stream may still read
        try:
            self.use()
            self._stream = self._call(
                "cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            )
        except BaseException:
            self._driver.cuDevicePrimaryCtxRelease(self._device)
            raise

    @property
    def stream(self) -> int:
        """The stream's handle, for TensorRT."""
        return int(self._stream)

    @property
    def compute_capability(self) -> int:
        """Times ten."""
        names = self._driver.CUdevice_attribute
        major, minor = (
            self._call(
                "cuDeviceGetAttribute",
                getattr(names, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"),
                self._device,
            )
            for part in ("MAJOR", "MINOR")
        )
        return 10 * major + minor

    def use(self) -> None:
        """Makes the GPU current for this thread: each has its own, and images are generated in
        any."""
        self._call("cuCtxSetCurrent", self._context)

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total), as the driver counts."""
        self.use()
        return self._call("cuMemGetInfo")

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory. Raises: UserError where the driver has no more, whatever it
        said before.
        """
        self.use()
        try:
            return int(self._call("cuMemAlloc", num_bytes))
        except RuntimeError as error:
            raise UserError(
                f"the GPU gave no {num_bytes:,} bytes ({error}); generate fewer images at once, or"
                " close what uses it"
            ) from error

    def free(self, address: int) -> None:
        """Frees device memory."""
        self.use()
        self._call("cuMemFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the device; it may be changed after the next wait."""
        self.use()
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)
            self._sources.append(array)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """A copy of device memory. Waits for everything before."""
        (array,) = self.download_all([(address, shape, dtype)])
        return array

    def download_all(
        self, parts: Sequence[tuple[int, tuple[int, ...], np.dtype | type]]
    ) -> list[np.ndarray]:
        """Copies of parts of device memory, each (address, shape, dtype), for a single wait."""
        self.use()
        arrays = [np.empty(shape, dtype) for _, shape, dtype in parts]
        for array, (address, _, _) in zip(arrays, parts, strict=True):
            self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)
        self.synchronize()
        return arrays

    def fill(self, address: int, byte: int, num_bytes: int) -> None:
        """Queues the filling of device memory with a byte."""
        self.use()
        self._call("cuMemsetD8Async", address, byte, num_bytes, self._stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queues a copy within device memory."""
        self.use()
        self._call("cuMemcpyDtoDAsync", target, source, num_bytes, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copies the first `width` bytes of rows that are `pitch` bytes apart."""
        self.use()
        memory = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        what = self._driver.CUDA_MEMCPY2D()
        what.srcMemoryType, what.srcDevice, what.srcPitch = (
            memory,
            self._driver.CUdeviceptr(source),
            source_pitch,
        )
        what.dstMemoryType, what.dstDevice, what.dstPitch = (
            memory,
            self._driver.CUdeviceptr(target),
            target_pitch,
        )
        what.WidthInBytes, what.Height = width, rows
        self._call("cuMemcpy2DAsync", what, self._stream)

    def load_kernel(self, image: bytes, entry: str) -> Kernel:
        """A kernel of a cubin for this GPU, or of PTX, which the driver compiles for it."""
        self.use()
        module = self._call("cuModuleLoadData", image + b"\0")
        try:
            return Kernel(module, self._call("cuModuleGetFunction", module, entry.encode()))
        except BaseException:
            self._driver.cuModuleUnload(module)
            raise

    def launch_kernel(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        num_threads: int,
        arguments: tuple[Any, ...],
        types: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Queues a grid of blocks of num_threads. types: the ctypes of the arguments; shared_bytes:
        of a block.
        """
        self.use()
        self._call(
            "cuLaunchKernel",
            kernel.function,
            *(*grid, 1),
            *(num_threads, 1, 1),
            shared_bytes,
            self._stream,
            (arguments, types),
            0,
        )

    def unload_kernel(self, kernel: Kernel) -> None:
        """Waits for the stream: the kernel may be under way."""
        try:
            self.synchronize()
        finally:
            self._call("cuModuleUnload", kernel.module)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Captures what work() queues as a graph; nothing is executed now."""
        self.use()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:  # the stream has to be usable again; a second complaint adds nothing
            result, *graph = self._driver.cuStreamEndCapture(self._stream)
            if result == self._driver.CUresult.CUDA_SUCCESS:
                self._driver.cuGraphDestroy(*graph)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            _, num_nodes = self._call("cuGraphGetNodes", graph, 0)
            return CudaGraph(self._call("cuGraphInstantiate", graph, 0), num_nodes)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: CudaGraph) -> None:
        """Queues a captured graph."""
        self.use()
        self._call("cuGraphLaunch", graph.executable, self._stream)

    def destroy(self, graph: CudaGraph) -> None:
        """Waits for the stream: the graph may be under way."""
        try:
            self.synchronize()
        finally:
            self._call("cuGraphExecDestroy", graph.executable)

    def synchronize(self) -> None:
        """Waits until all queued work is done."""
        self.use()
        self._call("cuStreamSynchronize", self._stream)
        self._sources.clear()

    def close(self) -> None:
        """Waits, then gives the stream and the context back, whatever fails on the way."""
        with ExitStack() as last_first:
            last_first.callback(self._call, "cuDevicePrimaryCtxRelease", self._device)
            last_first.callback(self._call, "cuStreamDestroy", self._stream)
            last_first.callback(self.synchronize)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the driver; returns what it gives beside its result: nothing, one
        value or a tuple. Raises: RuntimeError.
        """
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            _, reason = self._driver.cuGetErrorString(result)
            raise RuntimeError(
                f"{name}: {reason.decode() if isinstance(reason, bytes) else result}"
            )
        return values[0] if len(values) == 1 else tuple(values)
