"""The micro-batcher over a generator that does as it is told: turns, batches, cancels,
deadlines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from PIL import Image

from ssd_export.runtime.prompt_batch import ImageRequest
from ssd_export.serve.batcher import (
    BatchObserver,
    BatchRow,
    ClosingError,
    DeadlineError,
    ImageEvent,
    MicroBatcher,
    QueueFullError,
)

ROWS = 4
WAIT = 120.0  # seconds, for what should happen at once, on the busiest machine


class SteppedGenerator:
    """A generator whose rows come when the test lets them."""

    def __init__(self, max_images: int = 8) -> None:
        self.max_images, self.num_rows = max_images, ROWS
        self.batches: list[list[str]] = []
        self.rows_done: list[int] = []
        self.made: list[list[int]] = []  # places of the images of each row
        self.is_closed = False
        self.fails_at: int | None = None
        self._go = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)

    def let(self, rows: int) -> None:
        for _ in range(rows):
            self._go.release()

    def rows(
        self, requests: Sequence[ImageRequest], wants_preview: Callable[[int, int], bool]
    ) -> Iterator[BatchRow]:
        self.batches.append([request.prompt for request in requests])
        self.rows_done.append(0)
        self.arrived.release()
        for row in range(ROWS):
            assert self._go.acquire(timeout=WAIT)
            if row == self.fails_at:
                raise RuntimeError("the device is gone")
            last = row == ROWS - 1
            places = [place for place in range(len(requests)) if last or wants_preview(place, row)]
            self.rows_done[-1] += 1
            self.made.append(places)
            yield BatchRow(row, ROWS, {place: Image.new("RGB", (1, 1), row) for place in places})

    def close(self) -> None:
        self.is_closed = True


class DecodingGenerator(SteppedGenerator):
    """One whose pixels are made later, when the test lets them."""

    def __init__(self, max_images: int = 8) -> None:
        super().__init__(max_images)
        self.go_on, self.decoded = threading.Semaphore(0), 0
        self.fails_at_image: int | None = None

    def rows(
        self, requests: Sequence[ImageRequest], wants_preview: Callable[[int, int], bool]
    ) -> Iterator[BatchRow]:
        for row in super().rows(requests, wants_preview):
            yield BatchRow(row.row, ROWS, {}, self.decode) if row.is_last else row

    def decode(self, place: int) -> Image.Image:
        assert self.go_on.acquire(timeout=WAIT) and not self.is_closed
        if place == self.fails_at_image:
            raise RuntimeError("no memory for pixels")
        self.decoded += 1
        return Image.new("RGB", (1, 1), place)


class Counted(BatchObserver):
    def __init__(self) -> None:
        self.ends: dict[str, int] = {}

    def generated(self, images: int, seconds: float) -> None:
        self.dropped(images, "finished")

    def dropped(self, images: int, why: str) -> None:
        self.ends[why] = self.ends.get(why, 0) + images


class Caller:
    """Collects the events of its images."""

    def __init__(self, name: str = "") -> None:
        self.name, self.events = name, []
        self._ended = threading.Semaphore(0)

    def __call__(self, event: ImageEvent) -> None:
        self.events.append(event)
        if event.is_done or event.error:
            self._ended.release()

    def wait(self, images: int = 1) -> list[ImageEvent]:
        for _ in range(images):
            assert self._ended.acquire(timeout=WAIT)
        return self.events


def requests(*prompts: str) -> list[ImageRequest]:
    from ssd_export.noise import ImageSeed
    from ssd_export.sampling import Sampling

    return [
        ImageRequest(prompt, Sampling(), ImageSeed(0, number))
        for number, prompt in enumerate(prompts)
    ]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def generator() -> SteppedGenerator:
    return SteppedGenerator()


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batcher(generator: SteppedGenerator, counted: Counted, clock: Clock) -> Iterator[MicroBatcher]:
    made = MicroBatcher(
        lambda: generator, max_batch=3, max_waiting=6, observer=counted, clock=clock
    )
    yield made
    generator.let(1000)
    made.close(finish=False)
    assert generator.is_closed


def occupied(batcher: MicroBatcher, generator: SteppedGenerator) -> Caller:
    """A caller whose image is being generated, so that what comes next waits."""
    first = Caller()
    batcher.submit(requests("first"), first, caller="first")
    assert generator.arrived.acquire(timeout=WAIT)
    return first


def test_callers_share_a_batch_and_take_turns(
    batcher: MicroBatcher, generator: SteppedGenerator
) -> None:
    occupied(batcher, generator)
    many, one, other = Caller(), Caller(), Caller()
    batcher.submit(requests("m0", "m1", "m2", "m3"), many, caller="many")
    batcher.submit(requests("o0"), one, caller="one")
    batcher.submit(requests("p0"), other, caller="other")
    generator.let(3 * ROWS)
    many.wait(4)
    one.wait(), other.wait()
    assert generator.batches == [["first"], ["m0", "o0", "p0"], ["m1", "m2", "m3"]]
    assert [event.index for event in many.events] == [0, 1, 2, 3]


def test_previews_go_to_those_who_want_them(
    batcher: MicroBatcher, generator: SteppedGenerator
) -> None:
    occupied(batcher, generator)
    watching, waiting = Caller(), Caller()
    batcher.submit(requests("w"), watching, caller="a", preview_rows=(0, 2))
    batcher.submit(requests("x"), waiting, caller="b")
    generator.let(2 * ROWS)
    assert [(e.row, e.is_done) for e in watching.wait()] == [(0, False), (2, False), (3, True)]
    assert [(e.row, e.is_done) for e in waiting.wait()] == [(3, True)]


def test_a_full_queue_refuses_and_says_when_to_come_back(
    batcher: MicroBatcher, generator: SteppedGenerator
) -> None:
    occupied(batcher, generator)
    batcher.submit(requests(*"abcdef"), Caller())
    with pytest.raises(QueueFullError, match="6 images are waiting and the queue holds 6") as full:
        batcher.submit(requests("g"), Caller())
    assert full.value.seconds >= 1


def test_a_cancelled_ticket_gives_its_places_back(
    batcher: MicroBatcher, generator: SteppedGenerator, counted: Counted
) -> None:
    first = occupied(batcher, generator)
    gone, stays = Caller(), Caller()
    ticket = batcher.submit(requests(*"abcdef"), gone, caller="gone")
    ticket.cancel()
    assert batcher.num_waiting == 0
    batcher.submit(requests("stays"), stays, caller="stays")
    generator.let(2 * ROWS)
    first.wait(), stays.wait()
    assert generator.batches == [["first"], ["stays"]] and not gone.events
    assert counted.ends["cancelled"] == 6


def test_a_batch_that_nobody_waits_for_is_stopped(
    batcher: MicroBatcher, generator: SteppedGenerator, counted: Counted
) -> None:
    caller, following = Caller(), Caller()
    ticket = batcher.submit(requests("a", "b"), caller)
    assert generator.arrived.acquire(timeout=WAIT)
    ticket.cancel()
    batcher.submit(requests("c"), following)
    generator.let(1 + ROWS)
    following.wait()
    assert generator.rows_done == [1, ROWS] and not caller.events


def test_when_to_try_again_is_what_the_last_batch_took_an_image(
    batcher: MicroBatcher, generator: SteppedGenerator, clock: Clock
) -> None:
    both, following = Caller(), Caller()
    batcher.submit(requests("a", "b"), both)
    assert generator.arrived.acquire(timeout=WAIT)
    clock.now = 20
    generator.let(ROWS)
    both.wait(2)
    batcher.submit(requests("c"), following)
    assert generator.arrived.acquire(timeout=WAIT)  # the batch before is counted
    batcher.submit(requests(*"defghi"), following)
    with pytest.raises(QueueFullError) as full:
        batcher.submit(requests("j"), following)
    assert full.value.seconds == 6 * 10
    generator.let(3 * ROWS)
    following.wait(7)


def test_an_image_that_is_not_begun_in_time_fails(
    batcher: MicroBatcher, generator: SteppedGenerator, clock: Clock, counted: Counted
) -> None:
    first, late = occupied(batcher, generator), Caller()
    batcher.submit(requests("late"), late, seconds=10)
    clock.now = 11
    generator.let(ROWS)
    first.wait()
    (event,) = late.wait()
    assert isinstance(event.error, DeadlineError) and generator.batches == [["first"]]
    assert counted.ends["deadline"] == 1


def test_an_image_that_is_not_finished_in_time_fails_and_stops_its_batch(
    batcher: MicroBatcher, generator: SteppedGenerator, clock: Clock
) -> None:
    late = Caller()
    batcher.submit(requests("late"), late, seconds=10)
    assert generator.arrived.acquire(timeout=WAIT)
    clock.now = 11
    generator.let(1)
    (event,) = late.wait()
    assert isinstance(event.error, DeadlineError)
    following = Caller()
    batcher.submit(requests("next"), following)
    generator.let(ROWS)
    following.wait()
    assert generator.rows_done == [1, ROWS]


def test_an_image_that_is_late_fails_once_and_the_others_of_its_batch_go_on(
    batcher: MicroBatcher, generator: SteppedGenerator, clock: Clock, counted: Counted
) -> None:
    first, late, stays = occupied(batcher, generator), Caller(), Caller()
    batcher.submit(requests("late"), late, caller="a", seconds=10, preview_rows=(1, 2))
    batcher.submit(requests("stays"), stays, caller="b")
    generator.let(ROWS)
    first.wait()
    assert generator.arrived.acquire(timeout=WAIT)
    clock.now = 11
    generator.let(ROWS)
    stays.wait(), late.wait()
    assert [type(event.error) for event in late.events] == [DeadlineError]
    assert generator.made[ROWS:] == [[], [], [], [0, 1]], "previews for nobody"
    batcher.close()
    assert counted.ends == {"finished": 2, "deadline": 1}


def test_a_failed_batch_fails_its_images_and_the_next_one_is_generated(
    batcher: MicroBatcher, generator: SteppedGenerator, counted: Counted
) -> None:
    generator.fails_at = 1
    caller = Caller()
    batcher.submit(requests("a", "b"), caller)
    generator.let(2)
    assert [str(event.error) for event in caller.wait(2)] == ["the device is gone"] * 2
    generator.fails_at = None
    following = Caller()
    batcher.submit(requests("c"), following)
    generator.let(ROWS)
    assert following.wait()[-1].is_done
    assert counted.ends == {"failed": 2, "finished": 1}


def test_a_caller_whose_function_fails_harms_nobody_else(
    batcher: MicroBatcher, generator: SteppedGenerator
) -> None:
    occupied(batcher, generator)

    def fail(event: ImageEvent) -> None:
        raise ValueError("the loop is closed")

    fine = Caller()
    batcher.submit(requests("a"), fail, caller="a", preview_rows=(0,))
    batcher.submit(requests("b"), fine, caller="b")
    generator.let(2 * ROWS)
    assert fine.wait()[-1].is_done


def test_close_finishes_what_was_accepted_and_takes_no_more(counted: Counted) -> None:
    generator = SteppedGenerator()
    batcher = MicroBatcher(lambda: generator, max_batch=1, max_waiting=9, observer=counted)
    caller = Caller()
    batcher.submit(requests("a", "b", "c"), caller)
    generator.let(3 * ROWS)
    batcher.close()
    assert [event.is_done for event in caller.events] == [True] * 3 and generator.is_closed
    with pytest.raises(ClosingError):
        batcher.submit(requests("d"), Caller())


def test_reload_opens_anew_between_batches_and_keeps_the_old_where_that_fails() -> None:
    made: list[SteppedGenerator] = []

    def open_generator() -> SteppedGenerator:
        if len(made) == 2:
            raise OSError("the bundle is gone")
        made.append(SteppedGenerator())
        made[-1].let(1000)
        return made[-1]

    with MicroBatcher(open_generator, max_batch=1, max_waiting=9) as batcher:
        for round_ in range(3):
            caller = Caller()
            batcher.submit(requests(f"{round_}"), caller)
            assert caller.wait()[-1].is_done
            batcher.reload()
    assert [generator.batches for generator in made] == [[["0"]], [["1"], ["2"]]]
    assert made[0].is_closed and made[1].is_closed


def test_a_generator_that_cannot_be_opened_is_said_at_once() -> None:
    def fail() -> SteppedGenerator:
        raise ValueError("no bundle")

    with pytest.raises(ValueError, match="no bundle"):
        MicroBatcher(fail, max_batch=1, max_waiting=1)


@pytest.fixture
def decoding(counted: Counted) -> Iterator[tuple[MicroBatcher, DecodingGenerator]]:
    generator = DecodingGenerator()
    with MicroBatcher(
        lambda: generator, max_batch=2, max_waiting=9, observer=counted, clock=Clock()
    ) as batcher:
        yield batcher, generator
        generator.let(9 * ROWS)
        generator.go_on.release(99)


def test_a_batch_begins_while_the_pixels_of_the_one_before_are_made(
    decoding: tuple[MicroBatcher, DecodingGenerator], counted: Counted
) -> None:
    batcher, generator = decoding
    callers = [Caller() for _ in range(3)]
    batcher.submit(requests("a", "b"), callers[0])
    generator.let(ROWS)
    assert generator.arrived.acquire(timeout=WAIT)
    for caller in callers[1:]:
        batcher.submit(requests("c", "d"), caller)
    assert generator.arrived.acquire(timeout=WAIT), "the second begins"
    assert generator.decoded == 0 and not callers[0].events
    generator.let(ROWS)
    assert not generator.arrived.acquire(timeout=0.2), "at most one batch waits for its pixels"
    generator.go_on.release(2)
    assert [event.index for event in callers[0].wait(2)] == [0, 1]
    assert all(event.is_done and event.image for event in callers[0].events)
    assert generator.arrived.acquire(timeout=WAIT), "the third begins"
    generator.go_on.release(2)
    callers[1].wait(2)
    generator.let(ROWS)
    generator.go_on.release(2)
    callers[2].wait(2)
    batcher.close()
    assert counted.ends == {"finished": 6} and generator.is_closed


def test_pixels_that_fail_fail_the_images_that_are_left(
    decoding: tuple[MicroBatcher, DecodingGenerator], counted: Counted
) -> None:
    batcher, generator = decoding
    generator.fails_at_image = 1
    caller, following = Caller(), Caller()
    batcher.submit(requests("a", "b"), caller)
    generator.let(ROWS)
    generator.go_on.release(2)
    first, second = caller.wait(2)
    assert first.is_done and str(second.error) == "no memory for pixels"
    batcher.submit(requests("c"), following)
    generator.let(ROWS)
    generator.go_on.release()
    assert following.wait()[-1].is_done


def test_a_deadline_counts_while_pixels_are_made_and_a_cancel_saves_them(counted: Counted) -> None:
    generator, clock = DecodingGenerator(), Clock()
    with MicroBatcher(
        lambda: generator, max_batch=3, max_waiting=9, observer=counted, clock=clock
    ) as batcher:
        first, late, fine, gone = (Caller() for _ in range(4))
        batcher.submit(requests("x"), first, caller="x")
        assert generator.arrived.acquire(timeout=WAIT)
        batcher.submit(requests("a"), late, caller="a", seconds=5)
        batcher.submit(requests("b"), fine, caller="b")
        ticket = batcher.submit(requests("c"), gone, caller="c")
        generator.let(2 * ROWS)
        generator.go_on.release()
        assert first.wait()[-1].is_done and generator.arrived.acquire(timeout=WAIT)
        ticket.cancel()
        clock.now = 6.0
        generator.go_on.release(3)
        assert isinstance(late.wait()[-1].error, DeadlineError)
        assert fine.wait()[-1].is_done
        assert generator.decoded <= 3, "the pixels of what was cancelled are not made"
    assert not gone.events and counted.ends["cancelled"] == 1


def test_reload_and_close_wait_for_pixels(counted: Counted) -> None:
    made: list[DecodingGenerator] = []

    def opened() -> DecodingGenerator:
        made.append(DecodingGenerator())
        return made[-1]

    caller = Caller()
    with MicroBatcher(opened, max_batch=1, max_waiting=9, observer=counted) as batcher:
        batcher.submit(requests("a"), caller)
        made[0].let(ROWS)
        assert made[0].arrived.acquire(timeout=WAIT)
        batcher.reload()
        made[0].go_on.release()
        assert caller.wait()[-1].is_done, "the old one is open until its pixels are made"
        last = Caller()
        batcher.submit(requests("b"), last)
        for generator in made:
            generator.let(ROWS)
            generator.go_on.release()
        for _ in range(100):
            if len(made) == 2:
                made[1].let(ROWS)
                made[1].go_on.release()
                break
            threading.Event().wait(0.05)
    assert last.wait()[-1].is_done and made[0].is_closed and made[1].is_closed
