"""The CUDA driver as a double over host memory, for machines without a GPU: it really copies,
captures and replays.

Addresses are real, every access is checked to lie inside one allocation. While the stream is
captured nothing runs, and what a capture forbids (waiting, allocating, host memory) is refused as
the driver refuses it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUstream_flags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_DEVICE = 2


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUDA_MEMCPY2D:
    """The fields that are set; the real structure has offsets as well, zero here."""

    srcMemoryType = srcDevice = srcPitch = dstMemoryType = dstDevice = dstPitch = WidthInBytes = (
        Height
    ) = 0


ENUMS = (CUresult, CUstream_flags, CUdevice_attribute, CUmemorytype, CUstreamCaptureMode)
STREAM, CONTEXT, GRAPH = 7001, 7002, 7003
Work = Callable[[], None]


class CudaDouble:
    """Stands for the module cuda.bindings.driver. calls: (name, arguments) of every call, in
    order.
    """

    CUresult, CUstream_flags, CUdevice_attribute = CUresult, CUstream_flags, CUdevice_attribute
    CUmemorytype, CUstreamCaptureMode, CUDA_MEMCPY2D = (
        CUmemorytype,
        CUstreamCaptureMode,
        CUDA_MEMCPY2D,
    )
    CUdeviceptr = int

    def __init__(self, total_bytes: int = 1 << 30, has_gpu: bool = True) -> None:
        self.total_bytes, self.has_gpu = total_bytes, has_gpu
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.allocations: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Work]] = {}
        self._captured: list[Work] | None = None
        self._next_graph = GRAPH

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(found):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            return found(*arguments)

        return called

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    # What the double of TensorRT needs beside the driver's functions.

    def memory(self, address: int, num_bytes: int) -> np.ndarray:
        """Device bytes, writable. Asserts that they lie inside one allocation."""
        inside = [
            base
            for base, block in self.allocations.items()
            if base <= address and address + num_bytes <= base + len(block)
        ]
        assert inside, f"{num_bytes} bytes at {address:#x} are outside of device memory"
        start = address - inside[0]
        return self.allocations[inside[0]][start : start + num_bytes]

    def queue(self, work: Work) -> None:
        if self._captured is None:
            work()
        else:
            self._captured.append(work)

    @property
    def used_bytes(self) -> int:
        return sum(len(block) for block in self.allocations.values())

    def _refused_in_capture(self) -> bool:
        return self._captured is not None

    # The driver's functions.

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS if self.has_gpu else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuGetErrorString(self, result: CUresult) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, result.name.encode()

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 0

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 8 if attribute == 75 else 9

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS if context == CONTEXT else CUresult.CUDA_ERROR_INVALID_VALUE,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.total_bytes - self.used_bytes, self.total_bytes

    def cuMemAlloc(self, num_bytes: int) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        if num_bytes > self.total_bytes - self.used_bytes:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        block = np.full(num_bytes + 256, 0xCD, np.uint8)  # fresh memory holds anything
        block = block[-block.ctypes.data % 256 :][:num_bytes]
        self.allocations[block.ctypes.data] = block
        return CUresult.CUDA_SUCCESS, block.ctypes.data

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        return (
            CUresult.CUDA_SUCCESS
            if self.allocations.pop(address, None) is not None
            else CUresult.CUDA_ERROR_INVALID_VALUE,
        )

    def cuMemcpyHtoDAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        assert stream == STREAM
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.memory(target, num_bytes)[:] = _host(source, num_bytes)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoHAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        assert stream == STREAM
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        _host(target, num_bytes)[:] = self.memory(source, num_bytes)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoDAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        assert stream == STREAM
        self.queue(
            lambda: np.copyto(self.memory(target, num_bytes), self.memory(source, num_bytes))
        )
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpy2DAsync(self, what: CUDA_MEMCPY2D, stream: int) -> tuple[Any, ...]:
        assert stream == STREAM and {what.srcMemoryType, what.dstMemoryType} == {
            CUmemorytype.CU_MEMORYTYPE_DEVICE
        }
        assert what.WidthInBytes <= min(what.srcPitch, what.dstPitch)
        places = (what.srcDevice, what.srcPitch), (what.dstDevice, what.dstPitch)
        width, height = what.WidthInBytes, what.Height

        def copy() -> None:
            for row in range(height):
                source, target = (
                    self.memory(address + row * pitch, width) for address, pitch in places
                )
                target[:] = source

        self.queue(copy)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8Async(
        self, address: int, byte: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        assert stream == STREAM and 0 <= byte < 256
        self.queue(lambda: self.memory(address, num_bytes).fill(byte))
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, STREAM

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return (
            CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            if self._refused_in_capture()
            else CUresult.CUDA_SUCCESS,
        )

    def cuStreamBeginCapture(self, stream: int, mode: CUstreamCaptureMode) -> tuple[Any, ...]:
        assert stream == STREAM and self._captured is None
        self._captured = []
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self._next_graph += 1
        self.graphs[self._next_graph], self._captured = self._captured, None
        return CUresult.CUDA_SUCCESS, self._next_graph

    def cuGraphGetNodes(self, graph: int, num_nodes: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, [], len(self.graphs[graph])

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        self._next_graph += 1
        self.graphs[self._next_graph] = self.graphs[graph]
        return CUresult.CUDA_SUCCESS, self._next_graph

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        assert stream == STREAM
        for work in self.graphs[executable]:
            work()
        return (CUresult.CUDA_SUCCESS,)

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (CUresult.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        del self.graphs[executable]
        return (CUresult.CUDA_SUCCESS,)


def _host(address: int, num_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
