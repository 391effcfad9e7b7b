"""Takes turns: several threads share what only one caller can use at a time.

A call holds its turn until it is done, a stream also between two of its events. Who comes meanwhile
waits as long as the holder goes on. It is an error to wait for what can never go on: a stream that
the same thread has suspended, or one that stood still for `patience` seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ssd_export.errors import UserError

PATIENCE_SECONDS = 60.0
WAY_OUT = "finish or close that stream first, or open a second ImageGenerator"
CLOSED = "this ImageGenerator is closed; open another one"


class Turns:
    """Gives out one turn at a time.

    Args: patience: seconds to wait for a suspended holder.
    """

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self.patience = patience
        self._changed = threading.Condition()
        self._holder: Turn | None = None
        self._is_closed = False

    @contextmanager
    def take(self) -> Iterator[Turn]:
        """A turn, given back at the end.

        Raises: UserError where the holder of the turn before cannot be waited for, or all is
        closed.
        """
        turn = self._wait()
        try:
            yield turn
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()

    def close(self) -> None:
        """Waits for the holder to reach its next event or its end; no turn goes on afterwards."""
        with self._changed:
            while self._holder and self._holder.is_running and not self._holder.is_mine():
                self._changed.wait()
            self._is_closed = True
            self._changed.notify_all()

    def _wait(self) -> Turn:
        with self._changed:
            while self._holder and not self._is_closed:
                if self._holder.is_mine():
                    raise UserError(
                        "this ImageGenerator is in the middle of a stream of this thread;"
                        f" {WAY_OUT}"
                    )
                stood_still = self._holder.seconds_suspended()
                if stood_still >= self.patience:
                    raise UserError(
                        "this ImageGenerator is in the middle of a stream of another thread, which"
                        f" has not gone on for {stood_still:.0f} s; {WAY_OUT}"
                    )
                self._changed.wait(None if self._holder.is_running else self.patience - stood_still)
            self.check_open()
            self._holder = Turn(self, self._changed)
            return self._holder

    def check_open(self) -> None:
        """Raises UserError once it is closed."""
        if self._is_closed:
            raise UserError(CLOSED)


class Turn:
    """A holder's turn, and what it tells the others."""

    def __init__(self, turns: Turns, changed: threading.Condition) -> None:
        self._turns, self._changed = turns, changed
        self.is_running, self._thread, self._since = True, threading.get_ident(), 0.0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The time in which the holder's caller has an event, around a `yield`.

        Raises: UserError where all was closed meanwhile.
        """
        with self._changed:
            self.is_running, self._since = False, time.monotonic()
            self._changed.notify_all()
        yield
        with self._changed:
            self.is_running, self._thread = True, threading.get_ident()
            self._turns.check_open()

    def is_mine(self) -> bool:
        """Whether this thread had the turn last."""
        return self._thread == threading.get_ident()

    def seconds_suspended(self) -> float:
        """Seconds for which the holder's caller has had an event; 0 while the holder works."""
        return 0.0 if self.is_running else time.monotonic() - self._since
