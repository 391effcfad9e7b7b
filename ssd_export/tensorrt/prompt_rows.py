"""Which rows of a batch its prefill computes, and how all rows come to their prompts' caches.

A batch has two rows an image, and the unconditional rows of prompts of one length are the same.
Each different prompt is computed once, by a smaller run of the same engine, and copied on the
device: from what the engine returned, or among the rows of a cache that it wrote into by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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
    of its prompt among those, int64).

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


@dataclass(frozen=True)
class PromptRun:
    """Neighboring rows of a batch whose prompts are equally long: computed in this order from one
    place on, or all the one at that place.
    """

    first: int
    count: int
    place: int
    is_one_prompt: bool
    length: int


def prompt_runs(place: np.ndarray, lengths: np.ndarray) -> list[PromptRun]:
    """The runs of a batch, in order, each as long as it can be.

    Args: place: int64 [rows], of each row's prompt among those computed; lengths: [rows].
    """
    places, runs, first = place.tolist(), list[PromptRun](), 0
    while first < len(places):
        last = first + 1
        step = places[last] - places[first] if last < len(places) else 1
        while (
            last < len(places)
            and step in (0, 1)
            and places[last] - places[last - 1] == step
            and lengths[last] == lengths[first]
        ):
            last += 1
        is_one = last - first > 1 and step == 0
        runs.append(PromptRun(first, last - first, places[first], is_one, int(lengths[first])))
        first = last
    return runs


class CacheRows:
    """Copies prompts of num_tokens tokens, with padding, to the first slots of a cache's rows."""

    def __init__(self, device: CudaDevice, address: int, cache: Buffer, num_tokens: int) -> None:
        self._device, self._address = device, address
        rows, self._heads, slots = cache.shape[:3]
        self._slot_bytes = cache.num_bytes // (rows * self._heads * slots)
        self._pitch, self._source_pitch = slots * self._slot_bytes, num_tokens * self._slot_bytes

    def fill(self, run: PromptRun, source: int) -> None:
        """Copies a run from prompts that were computed as [rows, heads, num_tokens, ...]."""
        count = 1 if run.is_one_prompt else run.count
        start = source + run.place * self._heads * self._source_pitch
        self._copy(run, run.first, start, self._source_pitch, count)
        self._double(run, count)

    def spread(self, runs: Sequence[PromptRun]) -> None:
        """Copies prompts from the first rows of the cache, where they were computed, to all rows.

        A prompt's place among those computed is never behind its first row, so that what is copied
        from the last row on has not been overwritten.

        Args: runs: of the whole batch, with the padding in their lengths: a row may hold a longer
        prompt before.
        """
        for run in reversed(runs):
            if run.is_one_prompt:
                self._copy_down(run, run.first, 1, run.first - run.place)
                self._double(run, 1)
            else:
                self._copy_down(run, run.first, run.count, run.first - run.place)

    def _copy_down(self, run: PromptRun, first: int, count: int, distance: int) -> None:
        """Copies rows from `distance` rows before, the last ones first and so many at once that no
        copy reads what it writes.
        """
        end = first + count if distance else first
        while end > first:
            some = min(distance, end - first)
            end -= some
            self._copy(run, end, self._at(end - distance), self._pitch, some)

    def _double(self, run: PromptRun, count: int) -> None:
        """Repeats the first `count` rows of a run to its end, twice as many in each copy."""
        while count < run.count:
            some = min(count, run.count - count)
            self._copy(run, run.first + count, self._at(run.first), self._pitch, some)
            count += some

    def _at(self, row: int) -> int:
        return self._address + row * self._heads * self._pitch

    def _copy(self, run: PromptRun, row: int, source: int, source_pitch: int, count: int) -> None:
        width, rows = run.length * self._slot_bytes, count * self._heads
        self._device.copy_rows(self._at(row), self._pitch, source, source_pitch, width, rows)
