"""Runs native work in a separate thread, so that Ctrl-C reaches Python at once and stops it
cleanly.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.1


def run_interruptible(
    work: Callable[[], T], cancelled: Event, stopping: Callable[[], None] = lambda: None
) -> T:
    """The result of work(), or its error. Interrupted, sets `cancelled`, waits until work has
    ended, and raises.

    stopping: called before the wait.

    Further interrupts do not end the wait: a process that ends while native code calls back into
    Python aborts.
    Raises: KeyboardInterrupt, or SystemExit for a SIGTERM that was turned into one.
    """
    result: list[T] = []
    errors: list[BaseException] = []
    begin, ended = Event(), Event()

    def run() -> None:
        begin.wait()  # an interrupt while the thread starts finds nothing under way
        try:
            if not cancelled.is_set():
                result.append(work())
        except BaseException as error:  # handed to the caller, which waits for it
            errors.append(error)
        finally:
            ended.set()

    Thread(target=run, name="builder", daemon=True).start()
    try:
        begin.set()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            pass
    except BaseException:
        cancelled.set()
        begin.set()
        stopping()
        _wait(ended)
        raise
    if errors:
        raise errors[0]
    return result[0]


def _wait(ended: Event) -> None:
    while not ended.is_set():
        try:
            ended.wait(SECONDS_BETWEEN_LOOKS)
        except BaseException:  # told already
            continue
