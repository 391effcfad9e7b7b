"""The asynchronous twin of a stream, cancelling, and a seed for each image."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.runtime.async_events import in_thread
from ssd_export.runtime.generate import GenerationCancelledError, ImageGenerator

Exported = Callable[..., Path]
PROMPT = "a red circle"


class Steps:
    """An iterator that notes its threads, and whether it was closed."""

    def __init__(self, count: int) -> None:
        self.threads: set[int] = set()
        self.closed = threading.Event()
        self._count = count

    def __call__(self) -> Iterator[int]:
        try:
            for step in range(self._count):
                self.threads.add(threading.get_ident())
                time.sleep(0.005)
                yield step
        finally:
            self.threads.add(threading.get_ident())
            self.closed.set()


def test_everything_in_one_other_thread() -> None:
    steps = Steps(4)

    async def collect() -> list[int]:
        return [step async for step in in_thread(steps)]

    assert asyncio.run(collect()) == [0, 1, 2, 3]
    assert len(steps.threads) == 1 and threading.get_ident() not in steps.threads


def test_the_loop_is_free_meanwhile() -> None:
    """Each step waits for a tick of the loop."""
    ticked = threading.Event()

    def steps() -> Iterator[bool]:
        for _ in range(3):
            ticked.clear()
            yield ticked.wait(60)

    async def both() -> list[bool]:
        async def tick() -> None:
            while True:
                ticked.set()
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        found = [step async for step in in_thread(steps)]
        ticking.cancel()
        return found

    assert asyncio.run(both()) == [True] * 3


def test_leaving_early_closes_the_iterator() -> None:
    steps = Steps(1000)

    async def first() -> int:
        events = in_thread(steps)
        step = await anext_of(events)
        await events.aclose()
        return step

    assert asyncio.run(first()) == 0
    assert steps.closed.is_set() and len(steps.threads) == 1


async def anext_of(events: object) -> int:
    return await events.__anext__()  # type: ignore[attr-defined]


def test_a_cancelled_task_closes_the_iterator() -> None:
    steps = Steps(1000)

    async def cancelled() -> None:
        async def consume() -> None:
            async for _ in in_thread(steps):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert steps.closed.wait(60)


def test_an_error_reaches_the_caller() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise UserError("out of ink")

    async def collect() -> list[int]:
        return [step async for step in in_thread(fail)]

    with pytest.raises(UserError, match="out of ink"):
        asyncio.run(collect())


@pytest.fixture(scope="module")
def generator(exported: Exported) -> Iterator[ImageGenerator]:
    with ImageGenerator.from_bundle(exported()) as opened:
        yield opened


@pytest.mark.slow
def test_astream_is_stream(generator: ImageGenerator) -> None:
    async def collect() -> list:
        return [event async for event in generator.astream([PROMPT], seed=3)]

    events, expected = asyncio.run(collect()), list(generator.stream([PROMPT], seed=3))
    assert [event.row for event in events] == [event.row for event in expected]
    np.testing.assert_array_equal(events[-1].tokens, expected[-1].tokens)


@pytest.mark.slow
def test_astream_left_early_gives_the_generator_back(generator: ImageGenerator) -> None:
    async def one() -> int:
        async for event in generator.astream([PROMPT]):
            return event.row
        return -1

    assert asyncio.run(one()) == 0
    assert next(iter(generator.stream([PROMPT]))).row == 0


@pytest.mark.slow
def test_cancel_ends_what_is_generating(generator: ImageGenerator) -> None:
    generator.cancel()  # nothing is generating: nothing happens
    rows = []
    with pytest.raises(GenerationCancelledError):
        for event in generator.stream([PROMPT]):
            rows.append(event.row)
            if event.row == 2:
                thread = threading.Thread(target=generator.cancel)
                thread.start()
                thread.join()
    assert rows == [0, 1, 2]
    assert generator([PROMPT]).tokens.shape == (1, 576)


@pytest.mark.slow
def test_a_seed_for_each_image(generator: ImageGenerator) -> None:
    both = generator([PROMPT], num_images=2, seeds=[5, 9], max_batch=1)
    for place, seed in enumerate((5, 9)):
        alone = generator([PROMPT], seed=seed)
        np.testing.assert_array_equal(both.tokens[place], alone.tokens[0])
        np.testing.assert_array_equal(both.pixels[place], alone.pixels[0])
    with pytest.raises(UserError, match="1 seeds for 2 images; give one for each image"):
        generator.stream([PROMPT], num_images=2, seeds=[5])
