"""A measurement of bench in a separate process, so that its peak memory and its threads are its
own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ssd_export.bench.cell import Cell, StepProgress, measure
from ssd_export.errors import UserError
from ssd_export.worker_processes import threads_of_children


class Task(Protocol):
    """A measurement: its kind, and the batch and threads that concern its process."""

    @property
    def kind(self) -> str:
        """The kind of the measurement."""

    @property
    def batch(self) -> int:
        """Images generated at once."""

    @property
    def threads(self) -> int:
        """Threads of the CPU; None: all that this process may use."""


def run_cell(cell: Cell, progress: StepProgress) -> dict[str, Any]:
    """The result of measure(cell) in a fresh process. Raises: UserError as there, or where the
    process was killed.
    """
    return in_process(measure, cell, progress)


def in_process(work: Callable[[Any, StepProgress], Any], task: Task, progress: StepProgress) -> Any:
    """The result of work(task, progress) in a fresh process. Raises: UserError as there, or where
    the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, task, sender), daemon=True)
    with threads_of_children(task.threads):
        process.start()
    sender.close()
    try:
        while True:
            what, *rest = receiver.recv()
            if what == "progress":
                progress(*rest)
            elif what == "error":
                raise UserError(rest[0])
            else:
                return rest[0]
    except EOFError:
        process.join()
        raise UserError(
            f"measuring {task.kind} at batch {task.batch} was ended from outside (exit code"
            f" {process.exitcode}), most likely for want of memory; use a smaller --batch"
        ) from None
    finally:
        process.terminate()
        process.join()


def _child(work: Callable[[Any, StepProgress], Any], task: Task, sender: Connection) -> None:
    try:
        result = work(task, lambda done, total: sender.send(("progress", done, total)))
    except UserError as error:
        sender.send(("error", str(error)))
    except KeyboardInterrupt:
        pass  # the parent was interrupted too, and says so
    else:
        sender.send(("done", result))
