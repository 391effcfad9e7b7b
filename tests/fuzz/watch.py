"""Reads one input of a target under watch: only a UserError may end it, soon, and nothing outside
its folder is touched or run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from tests.fuzz.targets import Target

MOST_SECONDS = 20.0  # of processor time for one input; whole files take milliseconds
MOST_LETTERS = 4000  # of a message
NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
)  # audit events of running something, or of asking another machine
WRITING = ("w", "a", "x", "+")


class FindingError(AssertionError):
    """What no input may do."""


class _Watch:
    """Audit hooks cannot be taken off: one of them, that looks only while something is read."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in NEVER or (event == "ctypes.dlopen" and arguments[0] is not None):
            self.seen.append(f"{event}{arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode = os.path.abspath(os.fsdecode(arguments[0])), str(arguments[1] or "")
            if not path.startswith(self.folder) and (
                set(mode) & set(WRITING) or not _is_of_the_interpreter(path)
            ):
                self.seen.append(f"open {path[:200]!r} {mode}")


def _is_of_the_interpreter(path: str) -> bool:
    """Modules that are imported late, and what the machine says of itself."""
    ours = str(Path(__file__).parents[2])
    places = (sys.prefix, sys.base_prefix, ours, "/proc/", "/sys/", "/usr/", "/etc/localtime")
    return path.startswith(places)


WATCH: list[_Watch] = []


def read_watched(target: Target, content: bytes) -> str:
    """The message of the UserError that the input ends with, "" where it ends without one.

    Raises: FindingError, or whatever the product raised.
    """
    if not WATCH:
        WATCH.append(_Watch())
        for whole in target.seeds():  # imports what is imported late
            _read(target, whole)
    watch = WATCH[0]
    watch.seen.clear()
    began = time.process_time()
    message = _read(target, content, watch)
    if watch.seen:
        raise FindingError(f"{target.name}: {watch.seen[0]}")
    seconds = time.process_time() - began
    if seconds > MOST_SECONDS:
        raise FindingError(f"{target.name}: {seconds:.0f} s of processor time for one input")
    if not message.isprintable() or len(message) > MOST_LETTERS:
        raise FindingError(f"{target.name}: not one short line: {message[:300]!r}")
    return message


def _read(target: Target, content: bytes, watch: _Watch | None = None) -> str:
    folder = Path(tempfile.mkdtemp(prefix="ssd-export-fuzz-"))
    try:
        if watch is not None:
            watch.folder = str(folder)
        target.read(folder, content)
    except UserError as error:
        return str(error)
    finally:
        if watch is not None:
            watch.folder = None
        shutil.rmtree(folder, ignore_errors=True)
    return ""
