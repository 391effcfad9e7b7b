"""The seam between what is generated and where: one Runner a backend, one loop (`loop.py`) for all.

A runner holds the weights and the caches of one batch of images. Arrays that cross the seam are
numpy on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.graph_spec import CacheTensor
from ssd_export.noise import GumbelNoise
from ssd_export.runtime.prompt_batch import PromptBatch

WindowNoise = Callable[[], np.ndarray]


class Runner(Protocol):
    """One backend with the weights loaded. Call order: prefill, then for each later image token
    evict (when due) and decode_step, or decode_row, which does both for several steps. Backends
    inherit what has a body here.

    max_images: the most images of one batch; no_top_k: why it does not sample among the top k
    codes, "" where it does; no_window: why there is no decode_window, with the
    way out, "" where there is one; no_rows: the same of decode_rows; window_writes: what each token
    of a window costs beside its operations, in decode steps; fixed_window: tokens that every pass
    computes, and the most that one can keep, 0 where a pass has those asked for; opens_again:
    whether going from single steps to passes opens a graph, every time; on_gpu: where it computes;
    num_threads: of the CPU, 0 where the library takes as many as it likes; queues_steps: decode_row
    returns before the steps are taken, and is the faster the more steps it is given;
    decodes_beside_steps: another thread may call decode_image meanwhile; a core is there for it;
    make_noise: what fills the noise of a pass the fastest; fuses_steps: whether decode steps have
    the operators of ort_operators.py, of which passes have but some.
    """

    max_images: int = sys.maxsize
    no_top_k: str = ""
    window_writes: float = 0.0
    fixed_window: int = 0
    opens_again: bool = False
    on_gpu: bool = False
    no_window: str = "this runner takes one token a pass; use --runner ort, or --lookahead off"
    no_rows: str = "this runner takes one token a pass; use --runner ort, or --lookahead off"
    num_threads: int = 0
    queues_steps: bool = False
    decodes_beside_steps: bool = False
    make_noise: type[GumbelNoise] = GumbelNoise
    fuses_steps: bool = False

    def prefill(self, batch: PromptBatch) -> None:
        """Fills fresh caches from the prompts and generates token 0."""

    def evict(self, step: int) -> None:
        """Evicts tokens in every head that has none, before decode step `step` (R5, R7)."""

    def decode_step(self, step: int) -> None:
        """Generates token `step` from token `step - 1`."""

    def decode_row(self, steps: range, evictions: Collection[int]) -> None:
        """Generates the tokens of consecutive steps, with an eviction before each that is in
        `evictions`.

        A backend that queues work may return before the device has done any of it.
        """
        for step in steps:
            if step in evictions:
                self.evict(step)
            self.decode_step(step)

    def decode_window(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray, noise: WindowNoise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples several tokens of every image in one pass, and keeps those that single steps
        would sample: (sampled int32 [N, W], how many of each image are kept, int64 [N]).
        Evictions that are due before an image's first step are part of it.

        Args: first: each image's next step, int64 [N], the number of image tokens where it is done;
        limit: the most tokens to keep, int64 [N], 0 where it is done, and no more than the caches
        have room for; inputs: int32 [N, W], the token before that step, then drafts of those from
        it on, or the token written last where an image is done; noise: makes float32 [N, W, V] of
        the steps, where the backend makes none.
        """
        raise NotImplementedError(self.no_window)

    def decode_rows(
        self, steps: np.ndarray, inputs: np.ndarray, noise: np.ndarray, num_new: int
    ) -> np.ndarray:
        """Samples the tokens of steps in several grid rows in one pass, int32 [N, W], where caches
        keep everything. What is given goes into the slot of its position, whatever that held; a
        place sees the tokens up to its own that are there.

        Args: steps: int64 [W], the same of every image; inputs: int32 [N, W], the token before each
        step, or what stands in for it; noise: float32 [N, W, V] of the steps; num_new: of the first
        places that many are tokens from now on.
        """
        raise NotImplementedError(self.no_rows)

    def tokens(self) -> np.ndarray:
        """int32 [N, image tokens]; what is not generated yet is 0. Waits for the device."""

    def logits(self) -> np.ndarray:
        """float32 [rows, V] of the newest token, before guidance."""

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, height, width, 3] of codes int32 [n, image tokens]."""

    def cache_bytes(self) -> int:
        """Bytes allocated for the caches of the current batch."""

    def close(self) -> None:
        """Frees what the runner holds."""


class InspectableRunner(Runner, Protocol):
    """A runner whose caches and tokens can be read and replaced between steps, for `verify`.

    Of a CacheTensor by its kind: key, value [B, H, S, D] (bfloat16 as float32), position int32,
    score float32 [B, H, S], and key_scale, value_scale float32 [B, H, S] where keys and values are
    int8.
    """

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, provider: str, num_threads: int | None = None, exact: bool = False
    ) -> InspectableRunner:
        """A runner with the weights of a bundle; arguments as open_runner's, settled."""

    def read_cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor."""

    def write_cache(self, tensor: CacheTensor, values: np.ndarray) -> None:
        """Overwrites a cache tensor with values that a cache of this dtype held."""

    def force_tokens(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step, whatever was sampled."""
