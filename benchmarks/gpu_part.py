"""A part of gpu_report: named tasks against a deadline, whose results are kept as they come.

Of a task there is one of three ends: a result, a failure, or the reason why it was not run. What
was not run makes the report unfinished, which its exit code says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssd_export.errors import UserError

OK, FAILED, UNFINISHED = 0, 1, 3  # exit codes
Result = dict[str, Any]
Save = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """One check or measurement. run: returns a result, with "ok": False and "failures" where it
    failed; seconds: about how long it takes, so that none is begun that would not end in time.
    """

    name: str
    run: Callable[[], Result]
    seconds: float


def run_part(
    tasks: list[Task],
    results: dict[str, Result],
    deadline: float,
    save: Save,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs the tasks in order and adds each one's end to the results, saving after each.

    Args: deadline: on the clock; a task that would pass it is not run.
    """
    for task in tasks:
        left = deadline - clock()
        if task.seconds > left:
            reason = f"about {task.seconds:.0f} s, {max(left, 0):.0f} s left; give --minutes"
            results[task.name] = {"not_run": reason}
        else:
            say(task.name)
            began = clock()
            results[task.name] = ended(task.run)
            results[task.name]["seconds"] = round(clock() - began, 2)
        save()


def ended(run: Callable[[], Result]) -> Result:
    """A task's result; {"not_run": why} for what this machine lacks, and a failure where it broke:
    the others are worth their time all the same.
    """
    try:
        return run()
    except (UserError, ImportError) as error:
        return {"not_run": str(error)}
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        return {"ok": False, "failures": [f"{type(error).__name__}: {error}"]}


def verdict(result: Result) -> str:
    """The end of a task, for a table."""
    if "not_run" in result:
        return "not run"
    return "ok" if result.get("ok", True) else "FAILED"


def exit_code(results: dict[str, Result]) -> int:
    """FAILED where a task failed, UNFINISHED where one was not run, else OK."""
    verdicts = [verdict(result) for result in results.values()]
    if "FAILED" in verdicts:
        return FAILED
    return UNFINISHED if "not run" in verdicts or not verdicts else OK
