"""Speed of decode steps, and the speed that this machine's memory allows.

bound = bytes / bandwidth. bytes: every weight that a step multiplies by, as it is stored, and every
cache once; bandwidth: measured here, reading an array of as many bytes with as many threads.
`ssd-export bench` has the whole roofline, with arithmetic and by operator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.config import EMBED_TOKENS
from ssd_export.plan.generation import cache_bytes
from ssd_export.plan.sizes import stored_weights, weights_file

# Gathered from row by row, read by the prompt alone, or of the image decoder.
NOT_OF_A_STEP = (EMBED_TOKENS, "generation_embeddings.", "caption_projection.", "vqmodel.")
MOST_BYTES = 256 << 20  # beyond every cache; more would only take longer to read
RUNS = 5
GLANCE = 1024  # numbers
LOST_BITS = np.uint32(0x1FFF)  # of a float32 that float16 has not
GENERATING = "generating "
Clock = Callable[[], float]
Progress = Callable[[str, int, int], None]


@dataclass
class StepClock:
    """Times decode steps by what a progress callback is told of the tokens that are there.

    width: image tokens of a grid row, at whose end previews and images are decoded; num_tokens: of
    an image.
    """

    width: int
    num_tokens: int
    clock: Clock = time.perf_counter
    _last: tuple[int, float] | None = None
    _seconds: list[float] = field(default_factory=list)

    def __call__(self, done: int) -> None:
        """Notes that so many tokens of each image are there, batch after batch."""
        now = self.clock()
        if self._last is not None:
            before, then = self._last
            place = before % self.num_tokens
            # The first step of a batch opens graphs; after a row the images are decoded.
            if done > before and place > 1 and place % self.width:
                self._seconds.append((now - then) / (done - before))
        self._last = done, now

    @property
    def seconds(self) -> float | None:
        """The median of a token of every image; None where no step was seen by itself."""
        return statistics.median(self._seconds) if self._seconds else None


def timed(progress: Progress, clock: StepClock) -> Progress:
    """A progress callback that also tells the clock; GENERATING begins the stage of the tokens."""

    def both(stage: str, done: int, total: int) -> None:
        if stage.startswith(GENERATING):
            clock(done)
        progress(stage, done, total)

    return both


def step_bytes(bundle: Bundle, num_images: int) -> int:
    """Bytes that a decode step of so many images reads at least."""
    weights = sum(
        weight.num_bytes
        for name, weight in stored_weights(bundle).items()
        if not name.startswith(NOT_OF_A_STEP)
    )
    return weights + cache_bytes(bundle, num_images)


def packed_bytes(bundle: Bundle) -> int:
    """Bytes less that a step with the operators of engines/operators reads: float32 matrices whose
    numbers came in two bytes, which a glance at the beginning of each tells.
    """
    path, saved = bundle.file(weights_file(bundle)), 0
    for name, weight in stored_weights(bundle).items():
        is_matrix = weight.dtype == "float32" and len(weight.shape) == 2
        if is_matrix and not name.startswith(NOT_OF_A_STEP):
            count = min(GLANCE, weight.num_bytes // 4)
            seen = np.fromfile(path, np.uint32, count, offset=weight.offset)
            saved += 0 if np.any(seen & LOST_BITS) else weight.num_bytes // 2
    return saved


def read_bandwidth(num_bytes: int, num_threads: int, clock: Clock = time.perf_counter) -> float:
    """Bytes a second that so many threads read an array of this size with, the best of RUNS."""
    array = np.ones(max(1, min(num_bytes, MOST_BYTES) // 4), np.float32)
    parts = [part for part in np.array_split(array, num_threads) if part.size]
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        # Another thread is not woken for one part: on a busy machine that takes longer than to read
        # it.
        read = pool.map if len(parts) > 1 else map
        for _ in range(1 + RUNS):
            began = clock()
            list(read(np.max, parts))
            seconds.append(clock() - began)
    return array.nbytes / min(seconds[1:])


def speed_line(seconds: float, num_images: int, num_bytes: int, bandwidth: float) -> str:
    """The line of `generate` on a decode step that took so many seconds."""
    bound = num_bytes / bandwidth
    share, slowed = f"{bound / seconds:.0%}", ""
    if bound > seconds:  # the array was read more slowly than the step read its weights
        share, slowed = "over 100%", ", slowed by other programs"
    return (
        f"decode step: {1e3 * seconds:.3g} ms for {num_images} at once,"
        f" {num_images / seconds:,.0f} tokens/s, {share} of what memory allows"
        f" ({num_bytes / 1e6:,.0f} MB of weights and cache at {bandwidth / 1e9:.3g} GB/s{slowed})"
    )
