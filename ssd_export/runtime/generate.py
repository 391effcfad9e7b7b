"""Images from a bundle, whatever the backend: prompts in, an event for each grid row, images out.

Needs numpy, pillow, tokenizers and the chosen backend; neither torch nor transformers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.machine import num_cpus
from ssd_export.model.prompt import Prompt
from ssd_export.noise import ImageSeed
from ssd_export.plan.lookahead import OFF, AutoWindow, PassCost
from ssd_export.policy.schedule import rooms
from ssd_export.policy.table import MAX_LOOKAHEAD
from ssd_export.runtime.async_events import in_thread
from ssd_export.runtime.cache_report import CacheReport, cache_report
from ssd_export.runtime.decode_beside import DecodeBeside
from ssd_export.runtime.finite import check_logits
from ssd_export.runtime.lookahead import Lookahead
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import (
    ImageRequest,
    PromptBatch,
    PromptBatches,
    bundle_sampling,
)
from ssd_export.runtime.runner import Runner
from ssd_export.runtime.runners import DEFAULT, check_threads, find_runner, open_runner
from ssd_export.runtime.turns import Turns
from ssd_export.runtime.zipar import ParallelRows, check_rows
from ssd_export.sampling import MAX_IMAGES, Sampling, as_count, as_seed, rows_start

NOT_GENERATED_YET = 235  # gray level of the part of a preview that is still to come
MAX_BATCH = 16
AUTO = "auto"  # of lookahead: windows as they pay
OPENING, PREFILL = "opening the weights", "reading the prompts"
ImageDone = Callable[[int, Image.Image], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RowEvent:
    """A grid row of a batch is generated.

    Attributes:
        row: its number, 0 the first.
        tokens: int32 [N, image tokens] of all images, 0 where still to come.
        images: all of them in the last event; before, previews of the batch where they were asked
            for, else None.
        done: whether this is the last event.
        cache: what the caches of the batch take.
    """

    row: int
    tokens: np.ndarray
    images: list[Image.Image] | None
    done: bool
    cache: CacheReport


@dataclass(frozen=True)
class RequestRow:
    """Grid row `row` of a batch of requests is there. tokens: int32 [N, image tokens].

    images: by place in the batch; previews of those that asked, at the last row of all.
    """

    row: int
    tokens: np.ndarray
    images: dict[int, Image.Image]
    cache: CacheReport


@dataclass(frozen=True)
class GenerationResult:
    """The images of a call: those of prompt i begin at i * num_images.

    Attributes:
        images: N PIL images.
        tokens: int32 [N, image tokens].
        seconds: wall time of the call.
        cache: what the caches of the last batch took.
    """

    images: list[Image.Image]
    tokens: np.ndarray
    seconds: float
    cache: CacheReport

    @property
    def pixels(self) -> np.ndarray:
        """The images as one array, uint8 [N, height, width, 3]."""
        return np.stack([np.asarray(image) for image in self.images])


class GenerationCancelledError(Exception):
    """`ImageGenerator.cancel` ended the call or stream that raises it."""


@dataclass(frozen=True)
class _Request:
    """A checked request. image_done: called with every image."""

    images: list[ImageRequest]
    preview: bool
    max_batch: int
    decoder_batch: int
    image_done: ImageDone
    progress: Progress
    lookahead: int | str

    @property
    def num_batches(self) -> int:
        return -(-len(self.images) // self.max_batch)


class ImageGenerator:
    """Generates images from a bundle and keeps its weights loaded between calls. A context manager.

    Threads may share one: a call waits for its turn. A stream holds the turn until it is finished
    or closed, between its events, too. A second call of the thread that suspended it is a
    UserError; another thread waits, unless the stream stands still for a minute.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle, self.runner = bundle, runner
        self.config = bundle.config.model
        self.table = bundle.config.policy
        self.turns = Turns()
        self._is_cancelled = threading.Event()
        self.cache: CacheReport | None = None  # of the batch generated last
        self._ahead: Lookahead | ParallelRows | None = None  # of the same batch
        self._batches = PromptBatches.from_bundle(bundle)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        runner: str = DEFAULT,
        provider: str | None = None,
        num_threads: int | None = None,
        check: Callable[[Bundle], None] = lambda bundle: None,
        progress: Progress = lambda stage, done, total: None,
    ) -> ImageGenerator:
        """A generator for the bundle at path.

        Args:
            path: the bundle's folder.
            runner: ort (ONNX Runtime), torch or trt (TensorRT).
            provider: cpu or cuda; None takes the runner's usual one.
            num_threads: of the CPU; None chooses.
            check: called with the bundle before any weights are loaded.
            progress: told the stages of checking the files and loading the weights.

        Raises:
            UserError: a damaged bundle, an unknown runner or provider, a provider that cannot
            start.
        """
        find_runner(runner).provider(provider)
        check_threads(num_threads)
        bundle = open_bundle(path, progress)
        check(bundle)
        progress(OPENING, 0, 1)
        generator = cls(bundle, open_runner(bundle, runner, provider, num_threads))
        progress(OPENING, 1, 1)
        return generator

    def __enter__(self) -> ImageGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def passes(self) -> int:
        """Decode passes of the batch generated last: fewer than its steps with lookahead."""
        return self._ahead.passes if self._ahead else self.config.grid.num_tokens - 1

    def close(self) -> None:
        """Frees the weights and caches, once no thread computes with them."""
        self.turns.close()
        self.runner.close()

    def __call__(self, prompts: Iterable[Prompt], **options: Any) -> GenerationResult:
        """All images of the prompts; options as for `stream`."""
        began = time.perf_counter()
        *_, event = self.stream(prompts, **options)
        assert event.images is not None
        return GenerationResult(
            event.images, event.tokens, time.perf_counter() - began, event.cache
        )

    def stream(
        self,
        prompts: Iterable[Prompt],
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        num_images: int = 1,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        preview: bool = False,
        max_batch: int = MAX_BATCH,
        decoder_batch: int = 1,
        image_done: ImageDone = lambda number, image: None,
        progress: Progress = lambda stage, done, total: None,
        lookahead: int | str = 1,
    ) -> Iterator[RowEvent]:
        """An event for each finished grid row; the last one has done=True and the finished
        images.

        Image i is the same whatever the batch: its random numbers depend on seed and i alone.

        Args:
            prompts: one for each group of images: a string or, for a model that reads captions as
                embeddings, float32 [tokens, width].
            negative_prompt: what guidance leads away from, for all images or one for each prompt;
                "" is the model's own unconditional row.
            seed: 0 to 2**64 - 1.
            seeds: one for each image, in place of seed: image i is what seeds[i] generates first.
            num_images: images for each prompt.
            cfg_scale: strength of guidance, 1 is none; None takes the bundle's.
            temperature: divides the logits, 0 is greedy; None takes the bundle's.
            top_k: sample among the likeliest tokens only; 0 among all.
            preview: decode the unfinished images of every event.
            max_batch: images generated at once, and no more than the runner can; the others come
                one batch after the other, and rows then count within a batch. Where a second core
                is there, a batch is decoded to pixels while the tokens of the next are generated.
            decoder_batch: images decoded to pixels at once; at 384 x 384 the decoder's activations
                are 0.4 GB an image.
            lookahead: tokens of an image that a pass tries at once; the tokens are the same, up to
                near ties. 1 takes them one by one, more needs a runner that can (ort, torch, trt
                with engines for it); auto chooses for one image at a time, and takes them one by
                one where that is faster. zipar:S begins a grid row when the row above has S tokens:
                fewer passes, and other images; it needs a bundle that keeps everything.
            image_done: called with the number of each image, and the image, in order, before the
                first event after its pixels are there.
            progress: told the stages, in steps.

        Raises:
            UserError: at once for a prompt or a number that will not do; while it runs, for a
                generator that another caller has in use, and for numbers that are not finite.
        """
        sampling = bundle_sampling(self.bundle).changed(cfg_scale, temperature, top_k)
        count = as_count(num_images, "num_images", most=MAX_IMAGES)
        one_a_prompt = self._one_a_prompt(prompts, negative_prompt, sampling, count)
        seeds_of_images = _image_seeds(seed, seeds, len(one_a_prompt) * count)
        request = _Request(
            [
                replace(one_a_prompt[number // count], image=image)
                for number, image in enumerate(seeds_of_images)
            ],
            bool(preview),
            min(as_count(max_batch, "max_batch"), self.runner.max_images),
            as_count(decoder_batch, "decoder_batch"),
            image_done,
            progress,
            self.check_lookahead(lookahead),
        )
        return self._events(request)

    async def astream(self, prompts: Iterable[Prompt], **options: Any) -> AsyncIterator[RowEvent]:
        """`stream` for asyncio: the loop stays free while a row is computed.

        The stream runs in its own thread. Leaving the `async for`, closing the iterator or
        cancelling the task ends it after the row that is being computed. Options and errors as for
        `stream`.
        """
        events = in_thread(lambda: self.stream(prompts, **options))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    def cancel(self) -> None:
        """Ends the call or stream that is generating now, after the row that is being computed: it
        raises GenerationCancelledError. From any thread; does nothing where none is generating.
        """
        self._is_cancelled.set()

    def stream_requests(
        self,
        requests: Sequence[ImageRequest],
        wants_preview: Callable[[int, int], bool] = lambda place, row: False,
        image_done: ImageDone = lambda place, image: None,
        lookahead: int | str = 1,
        decodes: bool = True,
    ) -> Generator[RequestRow, None, None]:
        """Generates one batch, each image with its own prompt, sampling and random numbers.

        Args: requests: at most runner.max_images; wants_preview: of (place in the batch, row);
        image_done: called with the place of each image, and the image, as soon as its pixels are
        there; lookahead: as for stream; decodes: whether the last row has the images; where not,
        decode_tokens makes them from its tokens, in any thread while other batches are generated,
        if runner.decodes_beside_steps.
        Raises: UserError as stream.
        """
        mode = self.check_lookahead(lookahead)
        with self.turns.take() as turn:
            batch = self._batches.of_requests(requests)
            last, everywhere = self.config.grid.height - 1, range(len(requests))
            for row, cache in self._rows(batch, lookahead=mode):
                tokens, images = self.runner.tokens(), {}
                if row == last:
                    own = tokens if decodes else tokens[:0]
                    for place, image in enumerate(self._images(own, 1)):
                        images[place] = image
                        image_done(place, image)
                elif places := [place for place in everywhere if wants_preview(place, row)]:
                    images = dict(zip(places, self._previews(tokens[places], row, 1)))
                with turn.suspended():
                    yield RequestRow(row, tokens, images, cache)

    def decode_tokens(self, tokens: np.ndarray) -> Image.Image:
        """The image of int32 [image tokens]. Raises: UserError once the generator is closed."""
        return Image.fromarray(self._decode_while_open(tokens[None])[0])

    def check_lookahead(self, lookahead: int | str) -> int | str:
        """Returns the tokens of a pass, or auto, or zipar:S.

        Raises: UserError for a number that is none, or more than this runner can, and for grid rows
        in parallel where caches evict.
        """
        if lookahead == AUTO:
            return lookahead
        if (start := rows_start(lookahead)) is not None:
            check_rows(self.runner, self.table, start)
            return lookahead
        tokens = as_count(lookahead, "lookahead", way_out="use auto", most=MAX_LOOKAHEAD)
        if tokens != OFF and self.runner.no_window:
            raise UserError(self.runner.no_window)
        if self.runner.fixed_window and tokens > self.runner.fixed_window:
            raise UserError(
                f"a pass of this runner has up to {self.runner.fixed_window} tokens, not {tokens};"
                f" use --lookahead {self.runner.fixed_window}, or build-engine --lookahead {tokens}"
            )
        return tokens

    def check_requests(self, requests: Sequence[ImageRequest]) -> list[int]:
        """The tokens of each prompt, control tokens included.

        Raises: UserError for what stream_requests cannot generate.
        """
        return self._batches.check(requests)

    def cache_bytes_per_image(self) -> tuple[int, int]:
        """(as the policy allocates them, of a full cache) in bytes, prompt slots included."""
        size = DTYPES[self.bundle.config.dtype].num_bytes
        rows = self.config.rows_per_image
        return (
            self.table.cache_bytes(self.config, size, rows),
            self.table.full_cache_bytes(self.config, size, rows),
        )

    def _one_a_prompt(
        self,
        prompts: Iterable[Prompt],
        negative_prompt: str | Sequence[str],
        sampling: Sampling,
        num_images: int,
    ) -> list[ImageRequest]:
        """The first image of each prompt. Raises: UserError."""
        if isinstance(prompts, (str, bytes)):
            raise UserError('prompts is one string; give a list such as ["a red circle on white"]')
        try:
            listed = list(prompts)
        except TypeError:
            raise UserError(
                f"prompts is a {type(prompts).__name__}; give a list of strings"
            ) from None
        for prompt in listed:
            if not isinstance(prompt, (str, np.ndarray)):
                raise UserError(
                    f"a prompt is a {type(prompt).__name__}, not a string; give a list of strings"
                )
        negatives = _negative_prompts(negative_prompt, len(listed))
        first = ImageSeed(0, 0)
        requests = [
            ImageRequest(prompt, sampling, first, negative)
            for prompt, negative in zip(listed, negatives, strict=True)
        ]
        self._batches.check(requests)
        if len(listed) * num_images > MAX_IMAGES:
            raise UserError(
                f"{len(listed)} prompts of {num_images} images each are more than the {MAX_IMAGES}"
                " that one call generates; call several times, with other seeds"
            )
        return requests

    def _events(self, request: _Request) -> Iterator[RowEvent]:
        every, size = request.images, request.max_batch
        tokens = np.zeros((len(every), self.config.grid.num_tokens), np.int32)
        images: list[Image.Image] = []
        with self.turns.take() as turn, DecodeBeside(self._decode_while_open) as beside:
            self._is_cancelled.clear()
            request.progress(PREFILL, 0, 1)
            for start in range(0, len(every), size):
                part = slice(start, min(start + size, len(every)))
                batch = self._batches.of_requests(every[part])
                advance = partial(self._advance, request, start // size)
                for row, cache in self._rows(batch, advance, request.lookahead):
                    if self._is_cancelled.is_set():
                        raise GenerationCancelledError("cancelled by ImageGenerator.cancel")
                    tokens[part] = self.runner.tokens()
                    shown, done = None, False
                    if row < self.config.grid.height - 1:
                        _hand_out(map(Image.fromarray, beside.finished()), images, request)
                    else:
                        done = part.stop == len(every)
                        _hand_out(map(Image.fromarray, beside.rest()), images, request)
                        if self.runner.decodes_beside_steps and not done:
                            beside.add(tokens[part], request.decoder_batch)
                        else:
                            decoded = self._images(tokens[part], request.decoder_batch)
                            _hand_out(decoded, images, request)
                    if done:
                        shown = list(images)
                    elif request.preview:
                        shown = self._previews(tokens[part], row, request.decoder_batch)
                    with turn.suspended():
                        yield RowEvent(row, tokens.copy(), shown, done, cache)

    def _advance(self, request: _Request, number: int, num_tokens: int) -> None:
        """Tells the progress of a batch by its number."""
        if number == 0 and num_tokens == 1:
            request.progress(PREFILL, 1, 1)
        each = self.config.grid.num_tokens
        name = f"generating {num_images_text(len(request.images))}"
        request.progress(name, number * each + num_tokens, request.num_batches * each)

    def _rows(
        self,
        batch: PromptBatch,
        advance: Callable[[int], None] = lambda num_tokens: None,
        lookahead: int | str = 1,
    ) -> Iterator[tuple[int, CacheReport]]:
        """Generates a batch; yields after every grid row. advance: told how many tokens are
        there.
        """
        grid, dtype = self.config.grid, self.bundle.config.dtype
        steps = self._decode(batch, lookahead)
        next(steps)
        report = self.cache = cache_report(self.runner, self.bundle.config, batch)
        advance(1)
        for taken in steps:
            advance(taken.stop)
            if taken.stop % grid.width == 0:
                check_logits(self.runner.logits(), taken.stop - 1, dtype)
                yield taken.stop // grid.width - 1, report

    def _decode(self, batch: PromptBatch, lookahead: int | str) -> Iterator[range]:
        """The decode loop: one token a pass, or windows of tokens."""
        self._ahead, codes = None, self.config.codebook_size
        if (start := rows_start(lookahead)) is not None:
            self._ahead = ParallelRows(self.runner, batch, self.table, start, codes)
            return iter(self._ahead)
        window = self._auto_window(batch) if isinstance(lookahead, str) else lookahead
        if window == OFF:
            parts = None if self.runner.queues_steps else single_steps(self.config.grid.num_tokens)
            return decode(self.runner, batch, self.table, parts)
        self._ahead = Lookahead(self.runner, batch, self.table, window, codes)
        return iter(self._ahead)

    def _auto_window(self, batch: PromptBatch) -> AutoWindow | int:
        """The chooser of windows for one image; OFF for several at once, whose passes wait for the
        slowest, and where no window could pay.
        """
        if batch.num_images > 1 or self.runner.no_window:
            return OFF
        runner, threads = self.runner, self.runner.num_threads or num_cpus()
        cost = PassCost.of(
            self.bundle,
            1,
            threads,
            runner.on_gpu,
            runner.window_writes,
            runner.fixed_window,
            runner.opens_again,
            runner.fuses_steps,
        )
        window = AutoWindow(cost, rooms(self.table, batch.lengths.tolist()))
        return window if window.could_pay else OFF

    def _decode_while_open(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes images in another thread, unless the generator was closed meanwhile."""
        self.turns.check_open()
        return self.runner.decode_image(tokens)

    def _images(self, tokens: np.ndarray, decoder_batch: int) -> Iterator[Image.Image]:
        for start in range(0, len(tokens), decoder_batch):
            pixels = self.runner.decode_image(tokens[start : start + decoder_batch])
            yield from map(Image.fromarray, pixels)

    def _previews(self, tokens: np.ndarray, row: int, decoder_batch: int) -> list[Image.Image]:
        """Images of what is there: the rows to come repeat the last one for the decoder's sake and
        are grayed out.
        """
        height = self.config.grid.height
        grid = tokens.reshape(-1, height, self.config.grid.width).copy()
        grid[:, row + 1 :] = grid[:, row : row + 1]
        previews = []
        for image in self._images(grid.reshape(tokens.shape), decoder_batch):
            pixels = np.array(image)
            pixels[pixels.shape[0] * (row + 1) // height :] = NOT_GENERATED_YET
            previews.append(Image.fromarray(pixels))
        return previews


def _hand_out(decoded: Iterable[Image.Image], images: list[Image.Image], request: _Request) -> None:
    """Adds decoded images to those that are there, each announced by its number."""
    for image in decoded:
        request.image_done(len(images), image)
        images.append(image)


def _negative_prompts(asked: str | Sequence[str], num_prompts: int) -> list[str]:
    """One for each prompt. Raises: UserError."""
    negatives = [asked] * num_prompts if isinstance(asked, str) else list(asked)
    if len(negatives) != num_prompts:
        raise UserError(
            f"{len(negatives)} negative prompts for {num_prompts} prompts; give one for all, or one"
            " for each"
        )
    for negative in negatives:
        if not isinstance(negative, str):
            raise UserError(f"a negative prompt is a {type(negative).__name__}, not a string")
    return negatives


def _image_seeds(seed: int, seeds: Sequence[int] | None, num_images: int) -> list[ImageSeed]:
    """Keys of each image's random numbers. Raises: UserError."""
    if seeds is None:
        first = as_seed(seed)
        return [ImageSeed(first, image) for image in range(num_images)]
    if len(seeds) != num_images:
        raise UserError(f"{len(seeds)} seeds for {num_images} images; give one for each image")
    return [ImageSeed(as_seed(own), 0) for own in seeds]


def num_images_text(count: int) -> str:
    """1 image, 3 images."""
    return "1 image" if count == 1 else f"{count} images"
