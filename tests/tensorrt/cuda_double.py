"""The CUDA driver as a double over host memory, for machines without a GPU: it really copies,
captures and replays.

It is as strict as the driver, or stricter:
- Addresses are real, every access is checked to lie inside one allocation.
- What is queued on a stream runs when something waits for it, and not before. Work of other
  streams then runs in between, in an order drawn at random: only an event that a stream waits for
  puts it behind another's.
- A context is current for one thread. A call in a thread that has not made it current is refused,
  and so is every call after the context was given back.
- While a stream is captured nothing runs, and what a capture forbids (waiting, allocating, host
  memory) is refused.
- Memory, streams and the context cannot go while something that was made on them is alive: the
  double of TensorRT says what is (`alive`).
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from threading import get_ident
from typing import Any

import numpy as np

from ssd_export.kernels.noise_image import ENTRY, NUM_WARPS, noise_programs
from ssd_export.noise import GumbelNoise, ImageSeed


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
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
FIRST_STREAM, CONTEXT, GRAPH, FIRST_MODULE, FIRST_EVENT = 7001, 8002, 9003, 6004, 5005
Work = Callable[[], None]


@dataclass
class Record:
    """An event recorded on a stream; in the queue of another, that it waits for it."""

    is_reached: bool = False

    def reach(self) -> None:
        """The stream has come here."""
        self.is_reached = True


WITHOUT_CONTEXT = (
    "cuInit", "cuGetErrorString", "cuDeviceGet", "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease", "cuCtxSetCurrent",
)  # fmt: skip


class CudaDouble:
    """Stands for the module cuda.bindings.driver. calls: (name, arguments) of every call, in
    order; alive: what is made on the device and not yet destroyed, beside memory; faults: what went
    wrong where nothing can be raised.
    """

    CUresult, CUstream_flags, CUdevice_attribute = CUresult, CUstream_flags, CUdevice_attribute
    CUmemorytype, CUstreamCaptureMode, CUDA_MEMCPY2D = (
        CUmemorytype,
        CUstreamCaptureMode,
        CUDA_MEMCPY2D,
    )
    CUdeviceptr = int

    def __init__(self, total_bytes: int = 1 << 30, has_gpu: bool = True, seed: int = 0) -> None:
        self.total_bytes, self.has_gpu = total_bytes, has_gpu
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.allocations: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.alive: list[str] = []
        self.faults: list[str] = []
        self._queued: dict[int, list[Work | Record]] = {}  # by stream
        self._events: dict[int, Record | None] = {}  # the last record of each
        self._random = Random(seed)
        self._captured: dict[int, list[Work]] = {}
        self._next_graph, self._next_stream, self._next_module = GRAPH, FIRST_STREAM, FIRST_MODULE
        self._modules: set[int] = set()
        self._retained = 0
        self._current: dict[int, int] = defaultdict(int)  # context by thread

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(found):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            if name not in WITHOUT_CONTEXT and not self.is_current:
                return (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
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

    @property
    def is_current(self) -> bool:
        """Whether the context is current for this thread."""
        return self._retained > 0 and self._current[get_ident()] == CONTEXT

    def queue(self, stream: int, work: Work) -> None:
        assert stream in self._queued, "there is no such stream"
        (self._captured[stream] if stream in self._captured else self._queued[stream]).append(work)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._captured

    def run(self, stream: int) -> None:
        """All that is queued on a stream, and of the others what chance puts in between."""
        while self._queued[stream]:
            ready = [one for one, queue in self._queued.items() if queue and self._can_run(queue)]
            assert ready, "streams wait for each other"
            work = self._queued[self._random.choice(ready)].pop(0)
            if not isinstance(work, Record):
                work()

    @staticmethod
    def _can_run(queue: list[Work | Record]) -> bool:
        """Whether the first of a queue waits for no event that is still to be reached."""
        return not isinstance(queue[0], Record) or queue[0].is_reached

    @property
    def used_bytes(self) -> int:
        return sum(len(block) for block in self.allocations.values())

    def _refused_in_capture(self) -> bool:
        return bool(self._captured)

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
        self._retained += 1
        return CUresult.CUDA_SUCCESS, CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        assert not self.alive, f"{self.alive} are alive when their context goes"
        assert not self.graphs and not self._queued, "graphs or streams outlive their context"
        assert not self._modules, "modules outlive their context"
        assert not self._events, "events outlive their context"
        self._retained -= 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        if context != CONTEXT or not self._retained:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self._current[get_ident()] = context
        return (CUresult.CUDA_SUCCESS,)

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
        for stream in list(self._queued):  # freeing waits for the device
            self.run(stream)
        return (
            CUresult.CUDA_SUCCESS
            if self.allocations.pop(address, None) is not None
            else CUresult.CUDA_ERROR_INVALID_VALUE,
        )

    def cuMemcpyHtoDAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.memory(target, num_bytes)

        def copy() -> None:
            self.memory(target, num_bytes)[:] = _host(source, num_bytes)

        self.queue(stream, copy)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoHAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)

        def copy() -> None:
            _host(target, num_bytes)[:] = self.memory(source, num_bytes)

        self.queue(stream, copy)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoDAsync(
        self, target: int, source: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        ends = sorted(
            [(target, target + num_bytes), (source, source + num_bytes)]
        )  # the driver's copy of overlapping memory is undefined
        assert ends[0][1] <= ends[1][0], "a copy onto itself"
        self.memory(target, num_bytes), self.memory(source, num_bytes)
        self.queue(
            stream,
            lambda: np.copyto(self.memory(target, num_bytes), self.memory(source, num_bytes)),
        )
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpy2DAsync(self, what: CUDA_MEMCPY2D, stream: int) -> tuple[Any, ...]:
        assert {what.srcMemoryType, what.dstMemoryType} == {CUmemorytype.CU_MEMORYTYPE_DEVICE}
        assert what.WidthInBytes <= min(what.srcPitch, what.dstPitch)
        places = (what.srcDevice, what.srcPitch), (what.dstDevice, what.dstPitch)
        width, height = what.WidthInBytes, what.Height

        def copy() -> None:
            for row in range(height):
                source, target = (
                    self.memory(address + row * pitch, width) for address, pitch in places
                )
                target[:] = source

        self.queue(stream, copy)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8Async(
        self, address: int, byte: int, num_bytes: int, stream: int
    ) -> tuple[Any, ...]:
        assert 0 <= byte < 256
        self.queue(stream, lambda: self.memory(address, num_bytes).fill(byte))
        return (CUresult.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        assert image.endswith(b"}\n\0"), "PTX is a string that ends with a zero byte"
        self._next_module += 1
        self._modules.add(self._next_module)
        return CUresult.CUDA_SUCCESS, self._next_module

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        assert module in self._modules and name == ENTRY.encode()
        return CUresult.CUDA_SUCCESS, module  # one function each: the same handle will do

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:
        self._modules.remove(module)
        return (CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: Any, *numbers_and_arguments: Any) -> tuple[Any, ...]:
        """The noise kernel, the only one that is launched by itself."""
        *numbers, shared, stream, (arguments, types), extra = numbers_and_arguments
        grid, block = numbers[:3], numbers[3:]
        assert function in self._modules and not shared and not extra
        assert len(arguments) == len(types) == 7 and arguments[5:] == (0, 0)
        noise, images, first_step, num_images, codes = arguments[:5]
        num_steps = grid[0] // num_images
        assert block == [32 * NUM_WARPS, 1, 1]
        assert grid == [num_steps * num_images, noise_programs(codes), 1]

        def write() -> None:
            words = self.memory(images, 12 * num_images).view(np.uint32).reshape(-1, 3).tolist()
            seeds = [ImageSeed(low + (high << 32), image) for low, high, image in words]
            made = GumbelNoise(seeds, codes)(range(first_step, first_step + num_steps))
            self.memory(noise, made.nbytes)[:] = made.view(np.uint8).ravel()

        self.queue(stream, write)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        self._next_stream += 1
        self._queued[self._next_stream] = []
        return CUresult.CUDA_SUCCESS, self._next_stream

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        assert not self.alive, f"{self.alive} may still use the stream"
        assert self._queued.pop(stream) == [], "work is left on the stream"
        return (CUresult.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        event = max(self._events, default=FIRST_EVENT) + 1
        self._events[event] = None
        return CUresult.CUDA_SUCCESS, event

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._events[event] = record = Record()
        self.queue(stream, record.reach)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        """Waits for the last record before this call; for nothing where there was none."""
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        record = self._events[event]
        if record is not None:
            self._queued[stream].append(record)
        return (CUresult.CUDA_SUCCESS,)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        del self._events[event]
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if self._refused_in_capture():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.run(stream)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: int, mode: CUstreamCaptureMode) -> tuple[Any, ...]:
        assert stream in self._queued and not self._captured
        self._captured[stream] = []
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self._next_graph += 1
        self.graphs[self._next_graph] = self._captured.pop(stream)
        return CUresult.CUDA_SUCCESS, self._next_graph

    def cuGraphGetNodes(self, graph: int, num_nodes: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, [], len(self.graphs[graph])

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        self._next_graph += 1
        self.graphs[self._next_graph] = self.graphs[graph]
        return CUresult.CUDA_SUCCESS, self._next_graph

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        for work in self.graphs[executable]:
            self.queue(stream, work)
        return (CUresult.CUDA_SUCCESS,)

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (CUresult.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        del self.graphs[executable]
        return (CUresult.CUDA_SUCCESS,)


def _host(address: int, num_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
