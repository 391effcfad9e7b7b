"""The device memory of one batch size: planned, compared with what is free, allocated once, read by
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from ssd_export.graph_spec import CacheTensor, TensorSpec
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import (
    WAYS_OUT,
    Buffer,
    BufferPlan,
    check_device_memory,
    merged,
    plan_buffers,
)
from ssd_export.tensorrt.engine import TrtContext
from ssd_export.tensorrt.prompt_rows import CacheRows, prompt_runs
from ssd_export.tensorrt.step_form import carried

PROMPT_POSITIONS = "prompt_positions"  # to fill position caches from, for each number of heads
EMPTY = 0xFF  # every byte of the position -1
Copy = tuple[int, int, int]  # target, source, bytes
SAME_AS = {"token": "tokens"}  # the prefill's token is the first row of the token grid


class BatchMemory:
    """Buffers of the engines of a batch.

    Args: decode: whose tensors live on between runs; sizes: of the named dimensions, by context.
    Raises: UserError for too little device memory, before the allocation.
    """

    def __init__(
        self,
        device: CudaDevice,
        decode: TrtContext,
        others: Sequence[TrtContext],
        sizes: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._device, self._decode, self._sizes = device, decode.spec, sizes
        self.plan = _plan([decode, *others], sizes)
        num_images = sizes[decode.name]["images"]
        check_device_memory(
            f"a batch of {num_images}", self.plan.num_bytes, device.memory_bytes()[0], WAYS_OUT
        )
        self._address = device.allocate(self.plan.num_bytes)
        self._copies: dict[str, list[Copy]] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            for context in (decode, *others):
                self._bind(context)
            undo.pop_all()

    def buffer(self, name: str, context: str = "") -> Buffer:
        """A buffer that is private to the context, else the shared one of that name."""
        private = self.plan.private.get(context, {})
        return private[name] if name in private else self.plan.shared[name]

    def address(self, name: str, context: str = "") -> int:
        """Device address of a buffer."""
        return self._address + self.buffer(name, context).offset

    def upload(self, name: str, array: np.ndarray, context: str = "") -> None:
        """Copies an array into a buffer. Raises: ValueError for another shape or dtype than the
        buffer's.
        """
        buffer = self.buffer(name, context)
        if array.shape != buffer.shape or array.dtype != buffer.stored_dtype:
            raise ValueError(
                f"{name} is {buffer.stored_dtype} {buffer.shape}, not {array.dtype} {array.shape}"
            )
        self._device.upload(self._address + buffer.offset, np.ascontiguousarray(array))

    def download(self, name: str, context: str = "") -> np.ndarray:
        """A copy; waits for the device."""
        buffer = self.buffer(name, context)
        return self._device.download(
            self._address + buffer.offset, buffer.shape, buffer.stored_dtype
        )

    def cache_bytes(self) -> int:
        """Bytes of the caches, as allocated."""
        return sum(self.buffer(cache.past).num_bytes for cache in self._decode.cache_inputs)

    def clear(self) -> None:
        """Zeros (0 x NaN would be NaN), and no token in any slot."""
        for name, buffer in self.plan.shared.items():
            cache = CacheTensor.parse(name)
            byte = EMPTY if cache is not None and cache.kind == "position" else 0
            self._device.fill(self._address + buffer.offset, byte, buffer.num_bytes)

    def upload_first(self, name: str, array: np.ndarray, context: str = "") -> None:
        """Copies an array to the beginning of a buffer that may have more rows. Raises: ValueError
        for rows of another shape or dtype, or too many.
        """
        buffer = self.buffer(name, context)
        fits = len(array) <= buffer.shape[0] and array.shape[1:] == buffer.shape[1:]
        if not fits or array.dtype != buffer.stored_dtype:
            raise ValueError(
                f"{name} is {buffer.stored_dtype} {buffer.shape}, which {array.dtype}"
                f" {array.shape} is no part of"
            )
        self._device.upload(self._address + buffer.offset, np.ascontiguousarray(array))

    def download_first(self, name: str, num_rows: int, context: str = "") -> np.ndarray:
        """A copy of the first rows of a buffer; waits for the device."""
        buffer = self.buffer(name, context)
        shape = (num_rows, *buffer.shape[1:])
        return self._device.download(self._address + buffer.offset, shape, buffer.stored_dtype)

    def fill_caches(self, prefill: TrtContext, lengths: np.ndarray, place: np.ndarray) -> None:
        """Prompt token t to slot t of its row; all else stays as `clear` left it (R8).

        What the prefill has written into a cache by itself is there in the rows that it computed,
        and copied to the rows that share a prompt. What it returns comes as [rows, heads, tokens,
        ...], contiguous, where a cache has more slots: it is a device copy for each run of rows
        whose prompts are equally long.

        Args: lengths: of the batch's rows; place: int64 [rows], the computed row that each takes.
        """
        num_tokens = self._prompt_positions(prefill.name, lengths)
        padded = np.full(len(lengths), num_tokens)
        runs, padded_runs = prompt_runs(place, lengths), prompt_runs(place, padded)
        every_row = prompt_runs(np.arange(len(lengths)), padded)
        for cache in self._decode.cache_inputs:
            buffer = self.buffer(cache.past)
            rows = CacheRows(self._device, self.address(cache.past), buffer, num_tokens)
            if cache.present in prefill.aliases:
                rows.spread(padded_runs)
                continue
            is_position = cache.kind == "position"
            name = _positions(buffer.shape[1]) if is_position else cache.present
            for run in every_row if is_position else runs:
                rows.fill(run, self.address(name, prefill.name))

    def _prompt_positions(self, prefill: str, lengths: np.ndarray) -> int:
        """Uploads 0, 1, ... and then -1 for each row and head; returns the number of tokens."""
        own = self.plan.private[prefill]
        for name in (name for name in own if name.startswith(PROMPT_POSITIONS)):
            shape = own[name].shape
            slot = np.arange(shape[2], dtype=np.int32)
            positions = np.where(slot < lengths[:, None, None], slot, np.int32(-1))
            self.upload(name, np.ascontiguousarray(np.broadcast_to(positions, shape)), prefill)
        return shape[2]

    def close(self) -> None:
        """Waits for the device and frees the memory."""
        try:
            self._device.synchronize()
        finally:
            self._device.free(self._address)

    def carry(self, context: TrtContext) -> None:
        """Queues the copies of what a run leaves for the next one beside its inputs: positions,
        scores, tokens, the step. They lie in one order on both sides, so that it is one copy.
        """
        self.copy(self._copies[context.name])

    def carry_rows(self, context: TrtContext, rows: Sequence[int]) -> None:
        """The same of some rows of the batch alone."""
        for output, past in carried(context.spec, context.aliases).items():
            target, source = self.buffer(past), self.buffer(output)
            size = target.num_bytes // target.shape[0]
            for row in rows:
                start = self._address + row * size
                self._device.copy(start + target.offset, start + source.offset, size)

    def copies_of(self, context: TrtContext) -> list[Copy]:
        """Copies that carry what a run leaves among the shared buffers to where the next reads."""
        pairs = [
            (self.buffer(past), self.buffer(output))
            for output, past in carried(context.spec, context.aliases).items()
            if output in self.plan.shared
        ]
        return [
            (self._address + target, self._address + source, num_bytes)
            for target, source, num_bytes in merged(pairs)
        ]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Queues copies."""
        for target, source, num_bytes in copies:
            self._device.copy(target, source, num_bytes)

    def resize(self, context: TrtContext, sizes: Mapping[str, int]) -> None:
        """Gives a context smaller sizes than those it was planned for, in the same memory."""
        context.set_sizes(sizes)
        start, planned = self.plan.scratch[context.name]
        needed = context.scratch_bytes()
        if needed > planned:
            raise RuntimeError(
                f"TensorRT asks for {needed:,} bytes to run {context.name} at {dict(sizes)}, and"
                f" for {planned:,} at the whole batch"
            )
        context.use_scratch(self._address + start, planned)

    def holds(self, tensor: TensorSpec, sizes: Mapping[str, int]) -> bool:
        """Whether a tensor is among the shared buffers, in the shape that it has at these sizes."""
        buffer = self.plan.shared.get(tensor.name)
        return buffer is not None and buffer.shape == tensor.sizes(sizes)

    def _bind(self, context: TrtContext) -> None:
        spec, name = context.spec, context.name
        start, num_bytes = self.plan.scratch[name]
        context.use_scratch(self._address + start, num_bytes)
        for tensor in (*spec.inputs, *spec.outputs):
            place = context.aliases.get(tensor.name, tensor.name)
            context.bind(tensor.name, self.address(SAME_AS.get(place, place), name))
        self._copies[name] = self.copies_of(context)


def _plan(contexts: Sequence[TrtContext], sizes: Mapping[str, Mapping[str, int]]) -> BufferPlan:
    """Places for all tensors of the contexts, the first being the decode step's."""
    decode, aliases = contexts[0].spec, contexts[0].aliases
    left = carried(decode, aliases)
    tensors = {tensor.name: tensor for tensor in (*decode.inputs, *decode.outputs)}
    others = [name for name in tensors if name not in {*left, *left.values(), *aliases}]
    order = [*left.values(), *others, *left]
    shared = [tensors[name].resolved(sizes[contexts[0].name]) for name in order]
    private, scratch = {}, {}
    for context in contexts:
        spec, size = context.spec, sizes[context.name]
        context.set_sizes(size)
        scratch[context.name] = context.scratch_bytes()
        own = [
            tensor
            for tensor in (*spec.inputs, *spec.outputs)
            if tensor.name not in (*SAME_AS, *context.aliases)
            and tensors.get(tensor.name)
            != tensor  # of the same name and another shape: the prompt's
        ]
        private[context.name] = [tensor.resolved(size) for tensor in own]
        if "prompt_tokens" in size:
            for heads in sorted({int(t.shape[1]) for t in decode.cache_inputs.values()}):
                shape = (size["rows"], heads, size["prompt_tokens"])
                private[context.name].append(TensorSpec(_positions(heads), "int32", shape))
    return plan_buffers(shared, private, scratch)


def _positions(heads: int) -> str:
    return f"{PROMPT_POSITIONS}.{heads}"
