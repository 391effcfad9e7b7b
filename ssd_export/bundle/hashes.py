"""sha256 of files, and the memory of large ones that have not changed since they were hashed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.files import open_regular, read_file, replace_text

# A smaller file is hashed each time, a larger one when its time stamps change.
ALWAYS_HASHED_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
MOST_REMEMBERED = 256
MAX_MEMORY_BYTES = 1 << 20  # of the memory's file: 256 lines of a path and a hash


def sha256(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The sha256 of a regular file.

    Args: advance: called with the bytes of each block once they are hashed.
    Raises: OSError, UserError for another kind of file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


class HashMemory:
    """sha256 of large files by what a changed file does not keep: place, size and times.

    It is kept in the user's cache folder; one that cannot be read or written only costs time.
    """

    def __init__(self) -> None:
        self._known = _remembered()
        self._fresh: dict[str, str] = {}

    def sha256(self, path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
        """The sha256 of a file, large ones from memory. Raises: as the function of this name."""
        size = path.stat().st_size
        if size < ALWAYS_HASHED_BYTES:
            return sha256(path, advance)
        found = self._known.get(_stamp(path))
        if found is None:
            found = sha256(path, advance)
            self.note(path, found)
        else:
            advance(size)
        return found

    def note(self, path: Path, sha256: str) -> None:
        """Remembers what a file was hashed to, if it is large."""
        if path.stat().st_size >= ALWAYS_HASHED_BYTES:
            self._fresh[_stamp(path)] = sha256

    def save(self) -> None:
        """Writes what is new, and keeps the newest."""
        if not self._fresh:
            return
        newest = dict(list({**self._known, **self._fresh}.items())[-MOST_REMEMBERED:])
        with suppress(OSError, RuntimeError):
            _memory().parent.mkdir(parents=True, exist_ok=True)
            replace_text(_memory(), json.dumps(newest, indent=1) + "\n")


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(read_file(_memory(), MAX_MEMORY_BYTES))
    except (OSError, ValueError, RuntimeError, UserError):
        return {}
    return known if isinstance(known, dict) else {}


def _memory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ssd-export" / "sha256.json"


def _stamp(path: Path) -> str:
    status = path.stat()  # ctime too: touch cannot set it back
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
