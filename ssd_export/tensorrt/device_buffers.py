"""Layout of everything that depends on the batch in one stretch of device memory, planned before it
is allocated.

    shared   tokens, step, caches, ...: what the decode step keeps from one run to the next. First
             what a run leaves for the next one beside its inputs, last where it leaves it, both in
             one order: a single copy carries all of it over.
    private  one region for all engines in turn, since they never run at once: scratch memory, the
             prompt's keys and values, pixels. Nothing in it outlives the next engine that runs.
Every buffer begins at a multiple of 256 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.graph_spec import TensorSpec
from ssd_export.machine import gib
from ssd_export.tensorrt.cuda_device import ALIGNMENT

WAYS_OUT = (
    "generate fewer images at once, export with a smaller --budget, --kv-dtype int8 or --weights"
    " int4, close what else uses the GPU, or use --runner ort"
)


@dataclass(frozen=True)
class Buffer:
    """A tensor in the plan. offset: from the start of the memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return prod(self.shape) * DTYPES[self.dtype].num_bytes

    @property
    def stored_dtype(self) -> np.dtype:
        """numpy's dtype of the same size: bfloat16 is uint16."""
        return DTYPES[self.dtype].numpy


@dataclass(frozen=True)
class BufferPlan:
    """shared, and for each engine its private buffers and (offset, bytes) of its scratch memory."""

    shared: dict[str, Buffer]
    private: dict[str, dict[str, Buffer]]
    scratch: dict[str, tuple[int, int]]
    num_bytes: int


def plan_buffers(
    shared: Iterable[TensorSpec],
    private: Mapping[str, Iterable[TensorSpec]],
    scratch: Mapping[str, int],
) -> BufferPlan:
    """Places for everything.

    Args: shapes without names; private: the tensors that only one engine uses, by engine; scratch:
    bytes, by engine.
    """
    placed, region = _place(shared, 0)
    buffers: dict[str, dict[str, Buffer]] = {}
    places: dict[str, tuple[int, int]] = {}
    end = region
    for engine, num_bytes in scratch.items():
        buffers[engine], start = _place(private[engine], region)
        places[engine] = (start, num_bytes)
        end = max(end, _aligned(start + num_bytes))
    return BufferPlan(placed, buffers, places, end)


def _place(tensors: Iterable[TensorSpec], start: int) -> tuple[dict[str, Buffer], int]:
    placed = {}
    for tensor in tensors:
        placed[tensor.name] = Buffer(start, tensor.sizes({}), tensor.dtype)
        start = _aligned(start + placed[tensor.name].num_bytes)
    return placed, start


def merged(pairs: Iterable[tuple[Buffer, Buffer]]) -> list[tuple[int, int, int]]:
    """(target, source, bytes) that copy each pair's second buffer to its first, neighbors at once.

    Buffers are neighbors where one begins at the next multiple of 256 bytes behind the other, in
    targets and sources alike; what lies between them is copied along.
    """
    copies: list[tuple[int, int, int]] = []
    for target, source in sorted(pairs, key=lambda pair: pair[0].offset):
        if copies:
            first, first_source, num_bytes = copies[-1]
            behind = _aligned(num_bytes)
            if (first + behind, first_source + behind) == (target.offset, source.offset):
                copies[-1] = (first, first_source, behind + target.num_bytes)
                continue
        copies.append((target.offset, source.offset, target.num_bytes))
    return copies


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place_weights(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offset of each weight, and the bytes of all."""
    offsets, end = {}, 0
    for name, num_bytes in sizes.items():
        offsets[name], end = end, _aligned(end + num_bytes)
    return offsets, end


def check_device_memory(what: str, needed: int, free: int, ways_out: str) -> None:
    """Raises UserError where less is free than is needed, before anything is allocated."""
    if needed > free:
        raise UserError(
            f"{what} needs {gib(needed)} of device memory and {gib(free)} are free: {ways_out}"
        )
