"""Parts of long work on several processes: each takes the next part when it is free.

The processes ignore Ctrl-C and end when this one ends the work, or is gone. A part that fails, or
whose process was killed, is reported; the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ssd_export.errors import UserError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS_TO_LEAVE = 20
Tell = Callable[[int, int], None]
Work = Callable[[Any, Tell], None]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a part. refused: the message of a UserError; failed: of anything else; both ""
    where it is done.
    """

    refused: str = ""
    failed: str = ""


def run_parts(
    parts: Sequence[Any],
    jobs: int,
    open_work: Callable[[], Work],
    told: Callable[[Any, int, int], None],
    ended: Callable[[Any, Outcome], None],
) -> None:
    """Runs all parts, begun in their order; with one job in this process.

    Args: open_work: makes what is called with a part and a progress function, once in each process
    (so it and the parts are pickled); told: a part's progress; ended: every part's end, as it
    comes.
    """
    if jobs == 1:
        work = open_work()
        for part in parts:
            ended(part, _outcome(work, part, partial(told, part)))
        return
    _Pool(list(parts), open_work, told, ended).run(jobs)


class _Pool:
    def __init__(
        self,
        todo: list[Any],
        open_work: Callable[[], Work],
        told: Callable[[Any, int, int], None],
        ended: Callable[[Any, Outcome], None],
    ) -> None:
        self._todo, self._open_work, self._told, self._ended = todo, open_work, told, ended
        self._context = multiprocessing.get_context("spawn")
        self._busy: dict[Connection, tuple[BaseProcess, Any]] = {}

    def run(self, jobs: int) -> None:
        try:
            for _ in range(min(jobs, len(self._todo))):
                self._start()
            while self._busy:
                for pipe in wait(list(self._busy)):
                    assert isinstance(pipe, Connection)
                    self._hear(pipe)
        finally:
            for process, _ in self._busy.values():
                process.terminate()
            for process, _ in self._busy.values():
                process.join(SECONDS_TO_LEAVE)
                process.kill()
                process.join()

    def _start(self) -> None:
        """A new process, for the next part."""
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._open_work), daemon=True)
        with threads_of_children(1):
            process.start()
        theirs.close()
        self._busy[pipe] = process, None
        self._give(pipe)

    def _give(self, pipe: Connection) -> None:
        """The next part to a free process, or its leave."""
        process, _ = self._busy.pop(pipe)
        if self._todo:
            self._busy[pipe] = process, self._todo.pop(0)
            pipe.send(self._busy[pipe][1])
            return
        pipe.close()
        process.join()

    def _hear(self, pipe: Connection) -> None:
        process, part = self._busy[pipe]
        try:
            what, *said = pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            del self._busy[pipe]
            reason = (
                f"its process was ended from outside (exit code {process.exitcode}), most likely"
                " for want of memory; use fewer --jobs"
            )
            self._ended(part, Outcome(failed=reason))
            if self._todo:
                self._start()
        else:
            if what == "told":
                self._told(part, *said)
            else:
                self._ended(part, *said)
                self._give(pipe)


def _serve(pipe: Connection, open_work: Callable[[], Work]) -> None:
    try:
        _serve_parts(pipe, open_work)
    except SystemExit:
        os._exit(0)  # what was open is closed; taking the libraries down can take long


def _serve_parts(pipe: Connection, open_work: Callable[[], Work]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent is interrupted too, and ends this process
    signal.signal(signal.SIGTERM, _leave)
    opened: list[Work] = []

    def work(part: Any, tell: Tell) -> None:
        if not opened:
            opened.append(open_work())
        opened[0](part, tell)

    def send(*message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:  # nobody listens any more
            sys.exit()

    while True:
        try:
            part = pipe.recv()
        except (EOFError, OSError):
            return
        send("ended", _outcome(work, part, lambda done, total: send("told", done, total)))


def _leave(signum: int, frame: FrameType | None) -> None:
    """Leaves with everything open closed: temporary bundles, files that are half written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def _outcome(work: Work, part: Any, tell: Tell) -> Outcome:
    try:
        work(part, tell)
    except UserError as error:
        return Outcome(refused=str(error))
    except Exception as error:  # whatever it is, the other parts go on
        return Outcome(failed=f"{type(error).__name__}: {error}")
    return Outcome()


@contextmanager
def threads_of_children(count: int) -> Iterator[None]:
    """The environment in which BLAS and OpenMP of a new process take this many threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
