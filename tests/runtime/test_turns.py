"""Turns: whoever can be waited for is, and whoever cannot is one clear error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ssd_export.errors import UserError
from ssd_export.runtime.turns import Turns


def events(turns: Turns, log: list[str], name: str = "a", count: int = 3) -> Iterator[int]:
    """A stream, as ImageGenerator's: inside its turn it must be alone."""
    with turns.take() as turn:
        for number in range(count):
            log.append(f"{name} in")
            time.sleep(0.002)
            log.append(f"{name} out")
            with turn.suspended():
                yield number


def test_threads_take_turns() -> None:
    turns, log = Turns(), []
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda name: list(events(turns, log, name)), "abcdefgh"))
    assert done == [[0, 1, 2]] * 8
    for begins, ends in zip(log[::2], log[1::2], strict=True):
        assert begins.split() == [ends.split()[0], "in"]
    names = [entry.split()[0] for entry in log[::6]]
    assert sorted(names) == list("abcdefgh") and log[::2] == [
        f"{n} in" for n in names for _ in "abc"
    ]


def test_a_thread_does_not_wait_for_itself() -> None:
    turns, log = Turns(), []
    first = events(turns, log)
    next(first)
    for _ in range(2):
        with pytest.raises(UserError, match="middle of a stream of this thread.*close that stream"):
            next(events(turns, log))
    assert list(first) == [1, 2] and list(events(turns, log)) == [0, 1, 2]


def test_a_closed_stream_gives_its_turn_back() -> None:
    turns, log = Turns(), []
    first = events(turns, log)
    next(first)
    first.close()
    second = events(turns, log)
    next(second)
    del second
    assert list(events(turns, log)) == [0, 1, 2]


def test_a_failure_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.take():
        raise ZeroDivisionError
    with turns.take():
        pass


def test_another_thread_waits_while_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the last event on, not from when the waiting began."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("ssd_export.runtime.turns.time", clock)
    turns, log = Turns(patience=0.5), []
    first = events(turns, log, count=10)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(events(turns, log, "b")))
        for _ in first:
            now[0] += 0.4
            time.sleep(0.01)  # the other thread looks at the clock
        assert waiting.result(timeout=30) == [0, 1, 2]
    assert log.index("b in") == 20


def test_another_thread_does_not_wait_for_ever() -> None:
    turns, log = Turns(patience=0.05), []
    first = events(turns, log)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: next(events(turns, log)))
        with pytest.raises(UserError, match="another thread, which has not gone on for 0 s"):
            waiting.result(timeout=30)
    assert list(first) == [1, 2]


def test_a_stream_may_go_from_thread_to_thread() -> None:
    turns, log = Turns(), []
    first = events(turns, log)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, first).result(timeout=30) == 0
    assert next(first) == 1
    with pytest.raises(UserError, match="of this thread"):
        next(events(turns, log))
    assert next(first) == 2


def test_nothing_goes_on_once_it_is_closed() -> None:
    turns, log = Turns(), []
    first = events(turns, log)
    next(first)
    turns.close()
    for stream in (first, events(turns, log)):
        with pytest.raises(UserError, match="is closed"):
            next(stream)


def test_closing_waits_for_who_is_at_work() -> None:
    turns, inside, closed = Turns(), threading.Event(), []

    def work() -> None:
        with turns.take():
            inside.set()
            time.sleep(0.05)
            closed.append("work")

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(30)
    turns.close()
    closed.append("close")
    worker.join(30)
    assert closed == ["work", "close"]
