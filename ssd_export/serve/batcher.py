"""The micro-batcher: images that many callers ask for share the batches of one generator.

A batch is what is waiting when the generator is free, at most `max_batch` images; what arrives
while it runs waits for the next one. Callers take turns, an image each, so that one that asks for
many does not hold up the others. An image keeps its prompt, random numbers and sampling, so its
tokens do not depend on what shares its batch (docs/how-to/serve.md says where rounding shows).

One thread generates; events reach a caller through the function it gave, on that thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
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
    of them at the last."""

    row: int
    num_rows: int
    images: dict[int, Image.Image]

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

        Args: deliver: called on the batcher's thread with each event; it must not block. caller:
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
        began = self._clock()
        finished: set[int] = set()  # of images that failed
        completed = 0

        def is_wanted(place: int) -> bool:
            ticket = places[place].ticket
            return not ticket.is_cancelled and place not in finished

        def wants_preview(place: int, row: int) -> bool:
            return is_wanted(place) and row in places[place].ticket.preview_rows

        rows = self._opened.rows([place.request for place in places], wants_preview)
        try:
            for row in rows:
                self._expire(places, finished)
                for number, image in row.images.items():
                    if is_wanted(number):
                        completed += row.is_last
                        event = ImageEvent(places[number].index, row.row, image, row.is_last)
                        places[number].tell(event)
                if not row.is_last and not any(map(is_wanted, range(len(places)))):
                    break
        except Exception as error:
            log.exception("a batch of %d images failed", len(places))
            wanted = [place for number, place in enumerate(places) if is_wanted(number)]
            self._fail(wanted, error, "failed")
            return
        finally:
            close = getattr(rows, "close", None)
            if close is not None:
                close()
        seconds = self._clock() - began
        self._seconds_an_image = seconds / len(places)
        gone = len(places) - completed - len(finished)
        if gone:
            self._observer.dropped(gone, "cancelled")
        self._observer.generated(completed, seconds)

    def _expire(self, places: list[_Place], finished: set[int]) -> None:
        """Fails the images of a running batch whose time is over."""
        now = self._clock()
        for number, place in enumerate(places):
            deadline = place.ticket.deadline
            if number not in finished and deadline is not None and now >= deadline:
                finished.add(number)
                self._fail([place], DeadlineError("the image was not finished in time"), "deadline")

    def _fail(self, places: Sequence[_Place], error: Exception, why: str) -> None:
        for place in places:
            place.tell(ImageEvent(place.index, -1, error=error))
        if places:
            self._observer.dropped(len(places), why)
