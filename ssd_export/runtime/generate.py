"""The one loop that draws pictures, whatever the backend: prompts in, an event for each grid row,
pictures out.

Needs numpy, pillow, tokenizers and the chosen backend; neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.policy.schedule import tokens_dropped
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches, bundle_sampling
from ssd_export.runtime.runner import Runner
from ssd_export.runtime.runners import DEFAULT, check_threads, find_runner, open_runner
from ssd_export.sampling import as_count, as_seed

NOT_DRAWN_YET = 235  # grey level of the part of a preview that is still to come
MAX_BATCH = 16


@dataclass(frozen=True)
class CacheReport:
    """What the compression did, as allocated and counted, not as configured.

    bytes: all cache tensors of the batch; bytes_per_image: of the rows of one picture;
    image_bytes_per_image: its image slots alone; full_image_bytes_per_image: a slot for every image
    token and head, keys and values.
    tokens_dropped: (layer, KV head, token) triples released while one picture was drawn.
    """

    bytes: int
    bytes_per_image: int
    image_bytes_per_image: int
    full_image_bytes_per_image: int
    tokens_dropped: int

    @property
    def image_share(self) -> float:
        return self.image_bytes_per_image / self.full_image_bytes_per_image


@dataclass(frozen=True)
class RowEvent:
    """Grid row `row` (0 the first) is drawn. tokens: int32 [N, image tokens], 0 where still to
    come; images: previews, or None.
    """

    row: int
    tokens: np.ndarray
    images: list[Image.Image] | None
    done: bool


@dataclass(frozen=True)
class GenerationResult:
    """images: N PIL pictures; tokens: int32 [N, image tokens]; prompt i * num_images .. gives the
    images of prompt i.
    """

    images: list[Image.Image]
    tokens: np.ndarray
    seconds: float
    cache: CacheReport


class ImageGenerator:
    """Draws pictures from a bundle; keeps the weights loaded between calls. A context manager."""

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle, self.runner = bundle, runner
        self.config = bundle.config.model
        self.table = bundle.config.policy
        self._batches = PromptBatches.from_bundle(bundle)
        self.cache: CacheReport | None = None

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        runner: str = DEFAULT,
        provider: str | None = None,
        num_threads: int | None = None,
        check: Callable[[Bundle], None] = lambda bundle: None,
    ) -> ImageGenerator:
        """A generator for the bundle at path.

        Args: runner: ort (ONNX Runtime), torch or trt (TensorRT); provider: cpu or cuda, None takes
        the runner's usual one; num_threads: of the CPU, None chooses; check: asked before any
        weights are loaded.
        Raises: UserError for a damaged bundle, an unknown runner or provider, a provider that
        cannot start.
        """
        find_runner(runner).provider(provider)
        check_threads(num_threads)
        bundle = open_bundle(path)
        check(bundle)
        return cls(bundle, open_runner(bundle, runner, provider, num_threads))

    def __enter__(self) -> ImageGenerator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.runner.close()

    def __call__(self, prompts: Sequence[str], **options: Any) -> GenerationResult:
        """All pictures of the prompts; options as for `stream`."""
        began = time.perf_counter()
        *_, event = self.stream(prompts, **options)
        assert event.images is not None and self.cache is not None
        return GenerationResult(event.images, event.tokens, time.perf_counter() - began, self.cache)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_images: int = 1,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        preview: bool = False,
        max_batch: int = MAX_BATCH,
        decoder_batch: int = 1,
    ) -> Iterator[RowEvent]:
        """An event for each finished grid row; the last one has done=True and the finished
        pictures.

        Args: num_images: pictures for each prompt; cfg_scale, temperature (0: greedy): None takes
        the bundle's;
        preview: decode every event's pictures; max_batch: pictures drawn at once, and no more than
        the runner can; the others are drawn one batch after the other (rows then count within a
        batch); decoder_batch: pictures decoded to pixels at once (at 384 x 384 the decoder's
        activations are 0.4 GB a picture). Picture i is the same whatever the batch: its random
        numbers depend on seed and i alone.
        """
        if isinstance(prompts, str):
            raise UserError('prompts is one string; give a list such as ["a red circle on white"]')
        sampling = bundle_sampling(self.bundle).changed(cfg_scale, temperature, top_k)
        seed = as_seed(seed)
        num_images, max_batch, decoder_batch = (
            as_count(value, name)
            for name, value in (
                ("num_images", num_images),
                ("max_batch", max_batch),
                ("decoder_batch", decoder_batch),
            )
        )
        self._batches.check(prompts)
        every = [prompt for prompt in prompts for _ in range(num_images)]
        max_batch = min(max_batch, self.runner.max_images)
        grid = self.config.grid
        tokens = np.zeros((len(every), grid.num_tokens), np.int32)
        images: list[Image.Image] = []
        for start in range(0, len(every), max_batch):
            part = slice(start, min(start + max_batch, len(every)))
            batch = self._batches(every[part], sampling, seed, start)
            last = part.stop == len(every)
            for row in self._rows(batch):
                tokens[part] = self.runner.tokens()
                finished = row == grid.height - 1
                if finished:
                    images += self._pictures(tokens[part], decoder_batch)
                done = finished and last
                shown = (
                    list(images)
                    if done
                    else self._previews(tokens[part], row, decoder_batch)
                    if preview
                    else None
                )
                yield RowEvent(row, tokens.copy(), shown, done)

    def _rows(self, batch: PromptBatch) -> Iterator[int]:
        """Draws the batch; yields after every grid row."""
        steps = decode(self.runner, batch, self.table)
        next(steps)
        self.cache = self._checked_cache(batch)
        for row, _ in enumerate(steps):
            yield row

    def _checked_cache(self, batch: PromptBatch) -> CacheReport:
        """Proves that what is allocated is what the policy promises. Raises: RuntimeError if not (a
        bug).
        """
        size, rows = DTYPES[self.bundle.config.dtype].num_bytes, self.config.rows_per_image
        allocated, promised = (
            self.runner.cache_bytes(),
            self.table.cache_bytes(self.config, size, rows * batch.num_images),
        )
        if allocated != promised:
            raise RuntimeError(
                f"the runner holds {allocated} cache bytes, the policy table says {promised}"
            )
        return CacheReport(
            bytes=allocated,
            bytes_per_image=allocated // batch.num_images,
            image_bytes_per_image=self.table.image_cache_bytes(self.config, size, rows),
            full_image_bytes_per_image=self.table.full_image_cache_bytes(self.config, size, rows),
            tokens_dropped=sum(
                tokens_dropped(self.table, length)
                for length in batch.lengths[:: batch.num_images].tolist()
            ),
        )

    def _pictures(self, tokens: np.ndarray, decoder_batch: int) -> list[Image.Image]:
        starts = range(0, len(tokens), decoder_batch)
        decoded = [
            self.runner.decode_image(tokens[start : start + decoder_batch]) for start in starts
        ]
        return [Image.fromarray(pixels) for part in decoded for pixels in part]

    def _previews(self, tokens: np.ndarray, row: int, decoder_batch: int) -> list[Image.Image]:
        """Pictures of what is drawn: the rows to come repeat the last one for the decoder's sake
        and are greyed out.
        """
        height = self.config.grid.height
        grid = tokens.reshape(-1, height, self.config.grid.width).copy()
        grid[:, row + 1 :] = grid[:, row : row + 1]
        previews = []
        for picture in self._pictures(grid.reshape(tokens.shape), decoder_batch):
            pixels = np.array(picture)
            pixels[pixels.shape[0] * (row + 1) // height :] = NOT_DRAWN_YET
            previews.append(Image.fromarray(pixels))
        return previews
