"""The seam between what is drawn and where: one Runner per backend, one loop (`generate.py`) for
all.

A runner holds the weights and the caches of one batch of pictures. Arrays that cross the seam are
numpy on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ssd_export.config import NUM_IMAGE_TOKENS
from ssd_export.policy.table import PolicyTable


@dataclass(frozen=True)
class Sampling:
    """cfg_scale: guidance u + cfg_scale (c - u); temperature: 0 is greedy; top_k: 0 keeps every
    token.
    """

    cfg_scale: float
    temperature: float
    top_k: int = 0


@dataclass(frozen=True)
class PromptBatch:
    """What starts a batch of N pictures.

    embeds: float32 [2 N, T, hidden], padded on the right; lengths: int32 [2 N]; uniforms: float32
    [576, N] in [0, 1).
    """

    embeds: np.ndarray
    lengths: np.ndarray
    uniforms: np.ndarray
    sampling: Sampling

    @property
    def num_images(self) -> int:
        return self.uniforms.shape[1]


class Runner(Protocol):
    """One backend with the weights loaded. Call order: prefill, then for steps 1..575 evict (when
    due) and decode_step, or decode_row, which does both for several steps. Backends inherit what
    has a body here.

    max_images: the most pictures of one batch.
    """

    max_images: int = sys.maxsize

    def prefill(self, batch: PromptBatch) -> None:
        """Fills fresh caches from the prompts and draws token 0."""

    def evict(self, step: int) -> None:
        """Releases slots in every head that has none, before decode step `step` (R5, R7)."""

    def decode_step(self, step: int) -> None:
        """Draws token `step` from token `step - 1`."""

    def decode_row(self, steps: range, releases: Collection[int]) -> None:
        """Draws the tokens of consecutive steps, with a release before each that is in `releases`.

        A backend that queues work may return before the device has done any of it.
        """
        for step in steps:
            if step in releases:
                self.evict(step)
            self.decode_step(step)

    def tokens(self) -> np.ndarray:
        """int32 [N, 576]; what is not drawn yet is 0. Waits for the device."""

    def logits(self) -> np.ndarray:
        """float32 [2 N, V] of the token drawn last, before guidance."""

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, height, width, 3] of codes int32 [n, 576]."""

    def cache_bytes(self) -> int:
        """Bytes allocated for the caches of the current batch."""

    def close(self) -> None:
        """Frees what the runner holds."""


def release_steps(table: PolicyTable, lengths: Sequence[int]) -> frozenset[int]:
    """Steps before which some head that releases several slots at a time has no empty slot (R7)."""
    return frozenset().union(*(full_before(kind, lengths) for kind in table.release_kinds))


def full_before(kind: tuple[int, int], lengths: Sequence[int]) -> frozenset[int]:
    """The steps before which heads of that kind are full, in a row with a prompt of one of these
    lengths.

    A head with num_slots slots and a prompt of length L is full before step num_slots - L + 1, and
    then after every evict_every writes.
    """
    num_slots, evict_every = kind
    firsts = {num_slots - length + 1 for length in lengths}
    return frozenset(
        step for first in firsts for step in range(first, NUM_IMAGE_TOKENS, evict_every)
    )


def tokens_dropped(table: PolicyTable, length: int) -> int:
    """(layer, KV head, token) triples that a row with a prompt of this length drops while a picture
    is drawn.

    575 of the 576 tokens are written (the last one is only drawn).
    """
    dropped = 0
    for group in (group for layer in table.layers for group in layer):
        overflow = length + NUM_IMAGE_TOKENS - 1 - group.num_slots
        if overflow > 0:
            dropped += group.num_heads * -(-overflow // group.evict_every) * group.evict_every
    return dropped
