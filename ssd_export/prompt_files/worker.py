"""A warm generator that makes batches of images as PNG files; what fails, fails alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        if len(left) == 1 and len(tasks) == 1:
            if not isinstance(error, UserError):
                log.exception("the image of line %d failed", tasks[0].line)
            deliver(Outcome(tasks[0], error=_reason(error)))
            return
        log.info("a batch of %d images failed (%s); its halves are tried", len(tasks), error)
    half = -(-len(left) // 2)
    for part in (left[:half], left[half:]):
        if part:
            make_images(generator, part, deliver, lookahead)


def _png(generator: ImageGenerator, task: ImageTask, image: Image.Image) -> bytes:
    file = io.BytesIO()
    policy = {"policy": generator.table.name, "budget": f"{generator.table.budget:g}"}
    write_png_to(file, image, {**Result.of(task, generator.bundle.hash).texts(), **policy})
    return file.getvalue()


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text[:500] or type(error).__name__
