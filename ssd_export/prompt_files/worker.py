"""A warm generator that makes batches of images as PNG files; what fails, fails alone."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.plan.generation import check_memory
from ssd_export.prompt_files.results import Result
from ssd_export.prompt_files.tasks import ImageTask
from ssd_export.runtime.generate import ImageGenerator, Progress
from ssd_export.runtime.images import write_png_to

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """A generator to open. batch: images at once; checks_memory: refuse what memory cannot hold;
    lookahead: tokens of an image that a pass tries.
    """

    bundle: Path
    runner: str
    provider: str
    threads: int | None
    batch: int
    checks_memory: bool
    lookahead: int | str = 1

    def open_generator(self, progress: Progress = lambda *_: None) -> ImageGenerator:
        """Opens the generator. Raises: UserError for what cannot be opened, or is too much for this
        machine.
        """

        def check(opened: Bundle) -> None:
            if self.checks_memory:
                check_memory(opened, self.batch)

        generator = ImageGenerator.from_bundle(
            self.bundle, self.runner, self.provider, self.threads, check, progress
        )
        try:
            generator.check_lookahead(self.lookahead)
        except UserError:
            generator.close()
            raise
        return generator


@dataclass(frozen=True)
class Outcome:
    """An image's PNG file, or why there is none."""

    task: ImageTask
    png: bytes = b""
    error: str = ""


Deliver = Callable[[Outcome], None]


def make_images(
    generator: ImageGenerator,
    tasks: Sequence[ImageTask],
    deliver: Deliver,
    lookahead: int | str = 1,
) -> None:
    """Generates the images in one batch and delivers each as soon as its pixels are there.

    Where the batch fails, its halves are tried, down to the image that fails. What `deliver` raises
    ends the work.
    """
    left = list(tasks)

    def finished(place: int, image: Image.Image) -> None:
        done.append(place)
        try:
            deliver(Outcome(tasks[place], _png(generator, tasks[place], image)))
        except BaseException as error:
            not_delivered.append(error)
            raise

    done: list[int] = []
    not_delivered: list[BaseException] = []
    try:
        requests = [task.request for task in tasks]
        for _ in generator.stream_requests(requests, image_done=finished, lookahead=lookahead):
            pass
        return
    except Exception as error:
        if not_delivered:
            raise
        left = [task for place, task in enumerate(tasks) if place not in done]
        failure = error
    _try_again(generator, tasks, left, failure, deliver, lookahead)


def _try_again(
    generator: ImageGenerator,
    tasks: Sequence[ImageTask],
    left: Sequence[ImageTask],
    failure: Exception,
    deliver: Deliver,
    lookahead: int | str,
) -> None:
    """Tries the halves of what is left of a batch that failed; of one image, delivers why."""
    if len(tasks) == 1:
        if not isinstance(failure, UserError):
            log.error("the image of line %d failed", tasks[0].line, exc_info=failure)
        deliver(Outcome(tasks[0], error=_reason(failure)))
        return
    log.info("a batch of %d images failed (%s); its halves are tried", len(tasks), failure)
    half = -(-len(left) // 2)
    for part in (left[:half], left[half:]):
        if part:
            make_images(generator, part, deliver, lookahead)


class OverlappedImages:
    """Makes batches of images as make_images does, and decodes one batch while the tokens of the
    next are generated, where the runner has a core for it.

    Images are delivered in the order of their tasks, but for those that failed once and are tried
    again. At most one batch waits for its pixels. A context manager: leaving it drops what was not
    delivered; `finish` delivers it.
    """

    def __init__(
        self, generator: ImageGenerator, deliver: Deliver, lookahead: int | str = 1
    ) -> None:
        self._generator, self._deliver, self._lookahead = generator, deliver, lookahead
        self._thread = ThreadPoolExecutor(1, "ssd-export-decoder")
        self._decoding: deque[tuple[ImageTask, Future[bytes]]] = deque()
        self._failed: list[tuple[ImageTask, Exception]] = []

    def __enter__(self) -> OverlappedImages:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def make(self, tasks: Sequence[ImageTask]) -> None:
        """Generates the tokens of a batch and begins its pixels. What `deliver` raises ends the
        work.
        """
        if not self._generator.runner.decodes_beside_steps:
            make_images(self._generator, tasks, self._deliver, self._lookahead)
            return
        tokens, failure = self._tokens(tasks)
        self.finish()
        if failure is not None:
            _try_again(self._generator, tasks, tasks, failure, self._deliver, self._lookahead)
            return
        for task, own in zip(tasks, tokens, strict=True):
            self._decoding.append((task, self._thread.submit(self._decode, task, own)))

    def finish(self) -> None:
        """Delivers what is being decoded, and tries again what failed to be."""
        self._take(waits=True)
        failed, self._failed = self._failed, []
        for task, _ in failed:
            make_images(self._generator, [task], self._deliver, self._lookahead)

    def _tokens(self, tasks: Sequence[ImageTask]) -> tuple[np.ndarray, Exception | None]:
        """int32 [N, image tokens] of a batch, or why there are none."""
        tokens = np.zeros((0, 0), np.int32)
        requests = [task.request for task in tasks]
        rows = self._generator.stream_requests(requests, lookahead=self._lookahead, decodes=False)
        with closing(rows):
            while True:
                try:
                    tokens = next(rows).tokens
                except StopIteration:
                    return tokens, None
                except Exception as error:
                    return tokens, error
                self._take(waits=False)

    def _decode(self, task: ImageTask, tokens: np.ndarray) -> bytes:
        return _png(self._generator, task, self._generator.decode_tokens(tokens))

    def _take(self, waits: bool) -> None:
        """Delivers the images that are ready, or all."""
        while self._decoding and (waits or self._decoding[0][1].done()):
            task, decoded = self._decoding.popleft()
            error = decoded.exception()
            if isinstance(error, Exception):
                log.info("the pixels of line %d failed (%s); it is tried again", task.line, error)
                self._failed.append((task, error))
            else:
                self._deliver(Outcome(task, decoded.result()))


def _png(generator: ImageGenerator, task: ImageTask, image: Image.Image) -> bytes:
    file = io.BytesIO()
    policy = {"policy": generator.table.name, "budget": f"{generator.table.budget:g}"}
    write_png_to(file, image, {**Result.of(task, generator.bundle.hash).texts(), **policy})
    return file.getvalue()


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text[:500] or type(error).__name__
