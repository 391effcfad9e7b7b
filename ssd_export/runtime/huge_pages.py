"""Arrays that lie together in huge pages, where the system has them: a step walks through whole
caches, and each page of 4 KB is looked up and fetched ahead by itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import numpy as np

CACHE_LINE = 64


def zeros_together(shapes: Sequence[tuple[Sequence[int], np.dtype]]) -> list[np.ndarray]:
    """An array of zeros of each shape and dtype, all in one piece of memory, which is freed with
    the last of them.
    """
    ends = [0]
    for shape, dtype in shapes:
        size = prod(shape) * dtype.itemsize
        ends.append(ends[-1] + -(-size // CACHE_LINE) * CACHE_LINE)
    memory = _memory(max(ends[-1], 1))
    return [
        np.frombuffer(memory, dtype, prod(shape), start).reshape(shape)
        for (shape, dtype), start in zip(shapes, ends, strict=False)
    ]


def _memory(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone has it
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
