"""The device memory of one batch size: planned, compared with what is free, allocated once, read by
name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ssd_export.graph_spec import CacheTensor, TensorSpec
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import (
    WAYS_OUT,
    Buffer,
    BufferPlan,
    check_device_memory,
    plan_buffers,
)
from ssd_export.tensorrt.engine import TrtEngine

PROMPT_POSITIONS = (
    "prompt_positions"  # 0, 1, 2, ... for every row and head, to fill position caches from
)
EMPTY = 0xFF  # every byte of the position -1
SAME_AS = {"token": "tokens"}  # the prefill's token is the first row of the token grid


class BatchMemory:
    """Buffers of the engines of a batch.

    Args: decode: whose tensors live on between runs; sizes: of the named dimensions, by engine.
    Raises: UserError for too little device memory, before the allocation.
    """

    def __init__(
        self,
        device: CudaDevice,
        decode: TrtEngine,
        others: Sequence[TrtEngine],
        sizes: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._device, self._decode, self._sizes = device, decode.spec, sizes
        self.plan = _plan([decode, *others], sizes)
        num_images = sizes[decode.spec.name]["images"]
        check_device_memory(
            f"a batch of {num_images}", self.plan.num_bytes, device.memory_bytes()[0], WAYS_OUT
        )
        self._address = device.allocate(self.plan.num_bytes)
        for engine in (decode, *others):
            self._bind(engine)

    def buffer(self, name: str, engine: str = "") -> Buffer:
        """A buffer that is private to the engine, else the shared one of that name."""
        private = self.plan.private.get(engine, {})
        return private[name] if name in private else self.plan.shared[name]

    def address(self, name: str, engine: str = "") -> int:
        return self._address + self.buffer(name, engine).offset

    def upload(self, name: str, array: np.ndarray, engine: str = "") -> None:
        """Raises: ValueError for an array of another shape or dtype than the buffer."""
        buffer = self.buffer(name, engine)
        if array.shape != buffer.shape or array.dtype != buffer.stored_dtype:
            raise ValueError(
                f"{name} is {buffer.stored_dtype} {buffer.shape}, not {array.dtype} {array.shape}"
            )
        self._device.upload(self._address + buffer.offset, np.ascontiguousarray(array))

    def download(self, name: str, engine: str = "") -> np.ndarray:
        """A copy; waits for the device."""
        buffer = self.buffer(name, engine)
        return self._device.download(
            self._address + buffer.offset, buffer.shape, buffer.stored_dtype
        )

    def cache_bytes(self) -> int:
        return sum(self.buffer(cache.past).num_bytes for cache in self._decode.cache_inputs)

    def clear(self) -> None:
        """Zeros (0 x NaN would be NaN), and no token in any slot."""
        for name, buffer in self.plan.shared.items():
            cache = CacheTensor.parse(name)
            byte = EMPTY if cache is not None and cache.kind == "position" else 0
            self._device.fill(self._address + buffer.offset, byte, buffer.num_bytes)

    def fill_caches(self, prefill: str, lengths: np.ndarray) -> None:
        """Prompt token t to slot t of its row; all else stays as `clear` left it (R8)."""
        pattern = self.buffer(PROMPT_POSITIONS, prefill)
        num_tokens = pattern.shape[2]
        positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), pattern.shape)
        self.upload(PROMPT_POSITIONS, np.ascontiguousarray(positions), prefill)
        for cache in self._decode.cache_inputs:
            is_position = cache.kind == "position"
            source = self.address(PROMPT_POSITIONS if is_position else cache.present, prefill)
            self._fill(cache.past, source, num_tokens, lengths, 0 if is_position else 1)

    def close(self) -> None:
        self._device.synchronize()
        self._device.free(self._address)

    def _fill(
        self, cache: str, source: int, num_tokens: int, lengths: np.ndarray, source_step: int
    ) -> None:
        """Copies runs of rows whose prompts are equally long. source_step: 0 where all rows have
        the same source.
        """
        buffer = self.buffer(cache)
        _, heads, slots = buffer.shape[:3]
        slot_bytes = buffer.num_bytes // (len(lengths) * heads * slots)
        for first, last, length in _runs(lengths):
            self._device.copy_rows(
                target=self.address(cache) + first * heads * slots * slot_bytes,
                target_pitch=slots * slot_bytes,
                source=source + source_step * first * heads * num_tokens * slot_bytes,
                source_pitch=num_tokens * slot_bytes,
                width=length * slot_bytes,
                rows=(last - first) * heads,
            )

    def _bind(self, engine: TrtEngine) -> None:
        spec = engine.spec
        start, num_bytes = self.plan.scratch[spec.name]
        engine.use_scratch(self._address + start, num_bytes)
        for tensor in (*spec.inputs, *spec.outputs):
            name = spec.aliases.get(tensor.name, tensor.name)
            engine.bind(tensor.name, self.address(SAME_AS.get(name, name), spec.name))


def _plan(engines: Sequence[TrtEngine], sizes: Mapping[str, Mapping[str, int]]) -> BufferPlan:
    """Places for all tensors of the engines, the first being the decode step."""
    decode = engines[0].spec
    shared = [
        _sized(t, sizes[decode.name])
        for t in (*decode.inputs, *decode.outputs)
        if t.name not in decode.aliases
    ]
    known = {tensor.name for tensor in shared} | SAME_AS.keys()
    private, scratch = {}, {}
    for engine in engines:
        spec = engine.spec
        engine.set_sizes(sizes[spec.name])
        scratch[spec.name] = engine.scratch_bytes()
        own = [
            t
            for t in (*spec.inputs, *spec.outputs)
            if t.name not in known and t.name not in spec.aliases
        ]
        private[spec.name] = [_sized(tensor, sizes[spec.name]) for tensor in own]
        if "prompt_tokens" in sizes[spec.name]:
            heads = max(tensor.shape[1] for tensor in decode.cache_inputs.values())
            shape = (sizes[spec.name]["rows"], heads, sizes[spec.name]["prompt_tokens"])
            private[spec.name].append(TensorSpec(PROMPT_POSITIONS, "int32", shape))
    return plan_buffers(shared, private, scratch)


def _sized(tensor: TensorSpec, sizes: Mapping[str, int]) -> TensorSpec:
    return TensorSpec(
        tensor.name,
        tensor.dtype,
        tuple(sizes.get(dimension, dimension) for dimension in tensor.shape),
    )


def _runs(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first row, last row + 1, length) of each run of rows whose prompts are equally long."""
    borders = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for first, last in zip(borders, borders[1:], strict=False):
        yield first, last, int(lengths[first])
