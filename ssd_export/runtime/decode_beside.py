"""Pixels of a finished batch, decoded in another thread while the tokens of the next are generated.

The library computes without Python's lock, so that a second core has work wherever a step leaves it
idle: a small model's steps use one thread, a large one's wait for their slowest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


class DecodeBeside:
    """Decodes one part after the other and gives the pixels back in order, in the caller's thread.

    A context manager: leaving it waits for the part that is being decoded and drops the others.
    Args: decode: pixels uint8 [n, height, width, 3] of tokens int32 [n, image tokens].
    """

    def __init__(self, decode: Callable[[np.ndarray], np.ndarray]) -> None:
        self._decode = decode
        self._thread = ThreadPoolExecutor(1, "ssd-export-decoder")
        self._pending: deque[Future[np.ndarray]] = deque()

    def __enter__(self) -> DecodeBeside:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, tokens: np.ndarray, decoder_batch: int) -> None:
        """Begins a batch, int32 [N, image tokens], decoder_batch images at once."""
        for start in range(0, len(tokens), decoder_batch):
            part = tokens[start : start + decoder_batch].copy()
            self._pending.append(self._thread.submit(self._decode, part))

    def finished(self) -> Iterator[np.ndarray]:
        """Pixels uint8 [height, width, 3] of the images that are decoded. Raises: what decoding
        them raised.
        """
        while self._pending and self._pending[0].done():
            yield from self._pending.popleft().result()

    def rest(self) -> Iterator[np.ndarray]:
        """Pixels of all other images, waited for. Raises: as finished."""
        while self._pending:
            yield from self._pending.popleft().result()
