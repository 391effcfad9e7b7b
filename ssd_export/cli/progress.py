"""Progress of long work on stderr: a bar with the time left on a terminal, plain lines elsewhere.

The packages below know nothing of this: they call a function `progress(stage: str, done: int,
total: int)`, with done = total at the end of a stage, and stages one after the other. A stage that
is told as 0 of 1 and then 1 of 1 says when it begins. A stream that cannot be written (closed, a
full disk, whoever read it is gone) ends the progress, never the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 5.0


class ProgressReport:
    """A context manager whose value is the progress function; the bar ends, whatever ends the work.

    in_bytes: the stages whose done and total are bytes.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        in_bytes: Collection[str] = (),
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._in_bytes = in_bytes
        self._clock = clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._started = self._printed = 0.0
        self._already = 0  # done before the stage began: a resumed export

    def __enter__(self) -> ProgressReport:
        from rich.console import Console

        with suppress(OSError, ValueError):
            console = Console(file=self._stream)
            if console.is_terminal and not console.is_dumb_terminal:
                self._bar = _bar(console)
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with suppress(OSError, ValueError):
                self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Says how far the stage is; a new name begins a new stage."""
        with suppress(OSError, ValueError):
            self._say(stage, done, total)

    def _say(self, stage: str, done: int, total: int) -> None:
        new = stage != self._stage
        if new:
            self._stage, self._started, self._printed = stage, self._clock(), self._clock()
            self._already = done if stage in self._in_bytes else 0
        if self._bar:
            if new:
                self._task = self._bar.add_task(stage, total=total, amount="")
            amount = self._amount(stage, done, total)
            assert self._task is not None
            self._bar.update(self._task, completed=done, total=total, amount=amount)
        else:
            self._plain_line(stage, done, total)

    def _plain_line(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        seconds = now - self._started
        if (done, total) == (0, 1):
            line = f"{stage} ..."
        elif done >= total:
            line = f"{stage}: done in {_duration(seconds)}"
        elif now - self._printed < SECONDS_BETWEEN_LINES:
            return
        else:
            new = done - self._already
            left = f", {_duration(seconds / new * (total - done))} left" if new else ""
            amount = f" ({self._amount(stage, done, total)})" if stage in self._in_bytes else ""
            line = f"{stage}: {100 * done // total} %{amount}{left}"
        self._printed = now
        print(line, file=self._stream, flush=True)

    def _amount(self, stage: str, done: int, total: int) -> str:
        """The amount of a stage that is counted in bytes: 1.25 of 13.3 GB."""
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if stage in self._in_bytes else ""


def _bar(console: Console | None) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=console)


def _duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
