"""The micro-batcher: images that many callers ask for share the batches of one generator.

A batch is what is waiting when the generator is free, at most `max_batch` images; what arrives
while it runs waits for the next one. Callers take turns, an image each, so that one that asks for
many does not hold up the others. An image keeps its prompt, random numbers and sampling, so its
tokens do not depend on what shares its batch (docs/how-to/serve.md says where rounding shows).

One thread generates; where the generator says so, a second one makes the pixels of a batch, at most
one batch behind. Events reach a caller through the function it gave, on one of these threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from ssd_export.errors import UserError
from ssd_export.runtime.prompt_batch import ImageRequest

log = logging.getLogger(__name__)
Seconds = float


class QueueFullError(UserError):
    """More images wait than the queue may hold. seconds: after which to try again."""

    def __init__(self, waiting: int, most: int, seconds: Seconds) -> None:
        super().__init__(
            f"{waiting} images are waiting and the queue holds {most}; try again later"
        )
        self.seconds = seconds


class DeadlineError(UserError):
    """An image was not begun, or not finished, before the time that its caller set."""


class ClosingError(UserError):
    """The batcher takes no more images because it is being closed."""


@dataclass(frozen=True)
class BatchRow:
    """A grid row of a batch is there. images: of the images that asked for one at this row; all
    of them at the last, unless there is `decode`, which makes them by their places, in another
    thread while other batches are generated.
    """

    row: int
    num_rows: int
    images: dict[int, Image.Image]
    decode: Callable[[int], Image.Image] | None = None

    @property
    def is_last(self) -> bool:
        """Whether the images are complete."""
        return self.row == self.num_rows - 1


class BatchGenerator(Protocol):
    """Generates batches: ssd_export.ImageGenerator behind generator_batches, or a double."""

    max_images: int
    num_rows: int

    def rows(
        self, requests: Sequence[ImageRequest], wants_preview: Callable[[int, int], bool]
    ) -> Iterator[BatchRow]:
        """Generates the images, a BatchRow for each grid row.

        Args: wants_preview: of (place in the batch, row), asked before a row's previews are made.
        """

    def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True)
class ImageEvent:
    """News of one image for its caller: a preview, the finished image, or a failure.

    index: the image's place in what the caller submitted.
    """

    index: int
    row: int
    image: Image.Image | None = None
    is_done: bool = False
    error: Exception | None = None


@dataclass
class Ticket:
    """Images that one caller submitted together; `cancel` gives their places back."""

    requests: tuple[ImageRequest, ...]
    caller: str
    deadline: float | None
    preview_rows: frozenset[int]
    deliver: Callable[[ImageEvent], None]
    submitted: float
    begun: float | None = None
    _is_cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Drops what is not begun; a batch in which nobody waits any more is stopped."""
        self._is_cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller wants no more of it."""
        return self._is_cancelled.is_set()


@dataclass(frozen=True)
class _Place:
    """An image of a ticket."""

    ticket: Ticket
    index: int

    @property
    def request(self) -> ImageRequest:
        return self.ticket.requests[self.index]

    def tell(self, event: ImageEvent) -> None:
        if not self.ticket.is_cancelled:
            try:
                self.ticket.deliver(event)
            except Exception:
                log.exception("a caller's event function failed; its images are dropped")
                self.ticket.cancel()


@dataclass
class _Batch:
    """Images that are generated together. failed, completed: by their places."""

    places: list[_Place]
    began: float
    failed: set[int] = field(default_factory=set)
    completed: set[int] = field(default_factory=set)

    def is_wanted(self, number: int) -> bool:
        """Whether somebody still waits for the image."""
        is_over = number in self.failed or number in self.completed
        return not (is_over or self.places[number].ticket.is_cancelled)

    def wanted(self) -> list[int]:
        """The places of images that somebody waits for."""
        return [number for number in range(len(self.places)) if self.is_wanted(number)]

    def wants_preview(self, number: int, row: int) -> bool:
        """Whether an image asked for a preview after this row."""
        return self.is_wanted(number) and row in self.places[number].ticket.preview_rows

    def tell(self, number: int, row: int, image: Image.Image, is_last: bool) -> None:
        """Gives an image or its preview to its caller."""
        if self.is_wanted(number):
            if is_last:
                self.completed.add(number)
            place = self.places[number]
            place.tell(ImageEvent(place.index, row, image, is_last))


class BatchObserver:
    """Hears of the batcher's work; the metrics inherit it."""

    def waiting(self, images: int) -> None:
        """Hears how many images wait."""

    def waited(self, seconds: Seconds) -> None:
        """An image was begun after that time in the queue."""

    def generated(self, images: int, seconds: Seconds) -> None:
        """A batch is finished."""

    def dropped(self, images: int, why: str) -> None:
        """Images were not finished. why: cancelled, deadline or failed."""


class MicroBatcher:
    """Shares a generator among callers; submit from any thread. A context manager."""

    def __init__(
        self,
        open_generator: Callable[[], BatchGenerator],
        *,
        max_batch: int,
        max_waiting: int,
        observer: BatchObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the generator, on the thread that will use it.

        Args: open_generator: called again by `reload`; max_waiting: the most images in the queue.
        Raises: whatever open_generator raises.
        """
        self._open, self._max_batch, self._max_waiting = open_generator, max_batch, max_waiting
        self._observer = observer or BatchObserver()
        self._clock = clock
        self._queues: OrderedDict[str, deque[_Place]] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closing = self._is_reloading = False
        self._seconds_an_image = 1.0  # of the batches so far, to say when to try again
        self._opened: BatchGenerator | None = None
        self._opening_error: BaseException | None = None
        self._is_open = threading.Event()
        self._decoder = ThreadPoolExecutor(1, "ssd-export-decoder")
        self._decoding: Future[None] | None = None  # of the batch before
        self._thread = threading.Thread(target=self._work, name="ssd-export-batcher", daemon=True)
        self._thread.start()
        self._is_open.wait()
        if self._opening_error is not None:
            raise self._opening_error

    def __enter__(self) -> MicroBatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_waiting(self) -> int:
        """Images in the queue, those of cancelled tickets left out."""
        with self._changed:
            return self._num_waiting()

    def submit(
        self,
        requests: Sequence[ImageRequest],
        deliver: Callable[[ImageEvent], None],
        *,
        caller: str = "",
        seconds: Seconds | None = None,
        preview_rows: Sequence[int] = (),
    ) -> Ticket:
        """Puts images into the queue.

        Args: deliver: called on a thread of the batcher with each event; it must not block. caller:
        callers take turns. seconds: after which an unfinished image fails with DeadlineError.
        preview_rows: grid rows after which previews are wanted.
        Raises: QueueFullError, ClosingError.
        """
        now = self._clock()
        deadline = None if seconds is None else now + seconds
        ticket = Ticket(
            tuple(requests), caller, deadline, frozenset(preview_rows), deliver, submitted=now
        )
        with self._changed:
            if self._is_closing:
                raise ClosingError("the server is stopping; ask another one")
            waiting = self._num_waiting()
            if waiting + len(requests) > self._max_waiting:
                wait = max(1.0, waiting * self._seconds_an_image)
                raise QueueFullError(waiting, self._max_waiting, wait)
            queue = self._queues.setdefault(caller, deque())
            queue.extend(_Place(ticket, index) for index in range(len(requests)))
            self._observer.waiting(waiting + len(requests))
            self._changed.notify_all()
        return ticket

    def reload(self) -> None:
        """Opens the generator anew before the next batch; if that fails the old one stays."""
        with self._changed:
            self._is_reloading = True
            self._changed.notify_all()

    def close(self, finish: bool = True) -> None:
        """Takes no more images; generates what was accepted (or drops it), frees the generator."""
        with self._changed:
            self._is_closing = True
            if not finish:
                for queue in self._queues.values():
                    for place in queue:
                        place.ticket.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _num_waiting(self) -> int:
        return sum(
            not place.ticket.is_cancelled for queue in self._queues.values() for place in queue
        )

    def _work(self) -> None:
        try:
            self._opened = self._open()
        except BaseException as error:
            self._opening_error = error
            self._is_open.set()
            return
        self._is_open.set()
        while (places := self._next_batch()) is not None:
            if places:
                self._generate(places)
        self._finish_decoding()
        self._decoder.shutdown()
        self._opened.close()

    def _next_batch(self) -> list[_Place] | None:
        """Waits for images and takes them; None when the batcher is closing and nothing waits."""
        with self._changed:
            while not (self._queues or self._is_closing or self._is_reloading):
                self._changed.wait()
            reload, self._is_reloading = self._is_reloading, False
        if reload:
            self._reopen()
        with self._changed:
            if not self._queues:
                return None if self._is_closing else []
            return self._take()

    def _reopen(self) -> None:
        try:
            opened = self._open()
        except Exception:
            log.exception("the bundle could not be opened again; the old one stays")
            return
        assert self._opened is not None
        self._finish_decoding()
        self._opened.close()
        self._opened = opened
        log.info("the bundle was opened again")

    def _take(self) -> list[_Place]:
        """Takes up to max_batch images, one a caller in turn; expired and cancelled ones are
        dropped.
        """
        assert self._opened is not None
        places: list[_Place] = []
        most = min(self._max_batch, self._opened.max_images)
        now = self._clock()
        while self._queues and len(places) < most:
            caller, queue = self._queues.popitem(last=False)
            place = queue.popleft()
            if queue:
                self._queues[caller] = queue  # to the end: the other callers come first
            if place.ticket.is_cancelled:
                self._observer.dropped(1, "cancelled")
            elif place.ticket.deadline is not None and now >= place.ticket.deadline:
                self._fail([place], DeadlineError("the image was not begun in time"), "deadline")
            else:
                place.ticket.begun = now
                self._observer.waited(now - place.ticket.submitted)
                places.append(place)
        self._observer.waiting(self._num_waiting())
        return places

    def _generate(self, places: list[_Place]) -> None:
        assert self._opened is not None
        batch = _Batch(places, self._clock())
        rows = self._opened.rows([place.request for place in places], batch.wants_preview)
        try:
            for row in rows:
                self._expire(batch)
                for number, image in row.images.items():
                    batch.tell(number, row.row, image, row.is_last)
                if row.is_last and row.decode is not None:
                    self._finish_decoding()
                    self._seconds_an_image = (self._clock() - batch.began) / len(places)
                    self._decoding = self._decoder.submit(self._decode, batch, row)
                    return
                if not row.is_last and not batch.wanted():
                    break
        except Exception as error:
            self._fail_all(batch, error)
            return
        finally:
            close = getattr(rows, "close", None)
            if close is not None:
                close()
        self._seconds_an_image = (self._clock() - batch.began) / len(places)
        self._count(batch)

    def _decode(self, batch: _Batch, row: BatchRow) -> None:
        """Delivers the images of a batch as their pixels are there, on the decoder's thread."""
        assert row.decode is not None
        try:
            for number in batch.wanted():
                if batch.is_wanted(number):
                    image = row.decode(number)
                    self._expire(batch)
                    batch.tell(number, row.row, image, is_last=True)
        except Exception as error:
            self._fail_all(batch, error)
            return
        self._expire(batch)
        self._count(batch)

    def _finish_decoding(self) -> None:
        """Waits for the pixels of the batch before."""
        if self._decoding is not None:
            self._decoding.result()
            self._decoding = None

    def _count(self, batch: _Batch) -> None:
        gone = len(batch.places) - len(batch.completed) - len(batch.failed)
        if gone:
            self._observer.dropped(gone, "cancelled")
        self._observer.generated(len(batch.completed), self._clock() - batch.began)

    def _fail_all(self, batch: _Batch, error: Exception) -> None:
        log.error("a batch of %d images failed", len(batch.places), exc_info=error)
        self._fail([batch.places[number] for number in batch.wanted()], error, "failed")

    def _expire(self, batch: _Batch) -> None:
        """Fails the images of a running batch whose time is over."""
        now = self._clock()
        for number, place in enumerate(batch.places):
            deadline = place.ticket.deadline
            is_over = deadline is not None and now >= deadline
            if is_over and number not in batch.failed and number not in batch.completed:
                batch.failed.add(number)
                self._fail([place], DeadlineError("the image was not finished in time"), "deadline")

    def _fail(self, places: Sequence[_Place], error: Exception, why: str) -> None:
        for place in places:
            place.tell(ImageEvent(place.index, -1, error=error))
        if places:
            self._observer.dropped(len(places), why)
