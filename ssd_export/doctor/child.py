"""Runs a probe in a separate process: it may crash, hang or print without harm."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from ssd_export.doctor.probes import Facts
from ssd_export.errors import UserError, first_line
from ssd_export.extras import missing_package

SECONDS = 120.0  # importing torch from a cold network disk has taken half of it


@dataclass(frozen=True)
class Answer:
    """Answer of a probe. problem: one line where it failed, else ""."""

    problem: str = ""
    facts: Facts = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether what was tried works."""
        return not self.problem


def ask(probe: Callable[..., Facts], *arguments: str, seconds: float = SECONDS) -> Answer:
    """Asks a function in its own process; what ends or hangs that process is a problem like any
    other.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, probe, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return Answer(f"no answer within {seconds:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return Answer(f"its process ended with {_ended(process.exitcode)}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, probe: Callable[..., Facts], arguments: tuple[str, ...]) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # what native libraries write cannot be caught in any other way
    try:
        answer = Answer(facts=probe(*arguments))
    except UserError as error:
        answer = Answer(str(error))
    except ImportError as error:
        answer = Answer(missing_package(error) or _one_line(error))
    except Exception as error:  # a library's own, of any kind: that is what is asked
        answer = Answer(_one_line(error))
    sender.send(answer)
    sender.close()
    os._exit(0)  # taking a half-broken library down can hang


def _one_line(error: Exception) -> str:
    name, said = type(error).__name__, first_line(error)
    return said if said == name else f"{name}: {said}"


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
