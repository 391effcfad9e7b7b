"""Which rows of a batch its prefill computes, and how all rows come to their prompts' caches.

A batch has two rows an image, and the unconditional rows of prompts of one length are the same.
Each different prompt is computed once, by a smaller run of the same engine, and copied on the
device.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import Buffer


def prompt_sizes(num_images: int) -> list[int]:
    """Numbers of images at which the prefill of a batch of num_images may run: few, because
    TensorRT-RTX compiles kernels for each. 1 serves images of one prompt, the half prompts of one
    length, which share their unconditional row.
    """
    return sorted({1, num_images // 2 + 1, -(-3 * num_images // 4), num_images})


def rows_to_compute(batch: PromptBatch, sizes: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the batch that the prefill computes, int64 [R]; for every row of the batch the place
    of its prompt among those, int64, none behind the row itself).

    Args: sizes: numbers of images, the batch's the greatest. R is that of the least that holds
    every different prompt; places left over repeat the last one.
    """
    first, place = batch.different_rows()
    num_rows = len(batch.lengths)
    rows_per_image = num_rows // batch.num_images
    images = min(size for size in sizes if rows_per_image * size >= len(first))
    if images == batch.num_images:
        return np.arange(num_rows), np.arange(num_rows)
    return np.pad(first, (0, rows_per_image * images - len(first)), "edge"), place


def spreads(place: np.ndarray) -> list[tuple[int, int, int]]:
    """(first row, rows, source) of the copies that give each row the prompt at place[row] of the
    rows as they were computed, in an order in which no source is overwritten before it is read.

    Args: place: int64 [rows], none greater than its row.
    """
    borders = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(place)]
    runs = zip(borders, borders[1:], strict=False)
    copies = [(first, last - first, int(place[first])) for first, last in runs]
    return [copy for copy in reversed(copies) if copy[1] > 1 or copy[0] != copy[2]]


class CacheRows:
    """Rows of a cache while prompts of num_tokens are written to their first slots."""

    def __init__(self, device: CudaDevice, address: int, cache: Buffer, num_tokens: int) -> None:
        self._device, self._address = device, address
        rows, self._heads, slots = cache.shape[:3]
        slot_bytes = cache.num_bytes // (rows * self._heads * slots)
        self._width, self._pitch = num_tokens * slot_bytes, slots * slot_bytes

    def take(self, source: int, num_rows: int) -> None:
        """The first rows from what an engine computed."""
        self._copy(self._address, source, self._width, num_rows)

    def spread(self, first: int, count: int, source: int) -> None:
        """Rows from the first one on as another is, twice as many in each copy."""
        if source != first:
            self._copy(self._at(first), self._at(source), self._pitch, 1)
        done = 1
        while done < count:
            some = min(done, count - done)
            self._copy(self._at(first + done), self._at(first), self._pitch, some)
            done += some

    def _at(self, row: int) -> int:
        return self._address + row * self._heads * self._pitch

    def _copy(self, target: int, source: int, source_pitch: int, num_rows: int) -> None:
        rows = num_rows * self._heads
        self._device.copy_rows(target, self._pitch, source, source_pitch, self._width, rows)
