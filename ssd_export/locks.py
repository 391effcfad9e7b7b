"""Locks between processes: of a folder that several write into, and of a scratch folder for as long
as its maker lives.

They are flock's, which ends with the process however that ends. A file system without flock (some
network file systems) is no reason to refuse: folders are then locked by a file, and scratch folders
of killed processes stay.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssd_export.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
WAIT_SECONDS = 60.0  # for a lock that is held for milliseconds
POLL_SECONDS = 0.02
STALE_SECONDS = 300.0  # of a lock file: its process was killed
YOUNG_SECONDS = 60.0  # a scratch folder may not be locked yet
LOCK_FILE = ".lock"


def try_lock(number: int) -> bool | None:
    """Locks an open file or folder until it is closed: False where another process holds it, None
    where the file system has no locks. Raises: OSError for any other cause.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder while the block runs; waits for it.

    Raises: UserError where another process holds it for more than a minute.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    if fcntl is None:
        with _lock_file(folder, deadline):
            yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        while (held := try_lock(number)) is False:
            _wait(folder, deadline)
        if held is None:
            with _lock_file(folder, deadline):
                yield
        else:
            yield
    finally:
        os.close(number)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone when the block ends; those that killed processes left there
    under the same prefix go first.
    """
    _remove_dead(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    number = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if number is not None:
            try_lock(number)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if number is not None:
            os.close(number)


def _remove_dead(parent: Path, prefix: str) -> None:
    """Removes scratch folders whose maker holds no lock any more."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if fcntl is None or time.time() - folder.lstat().st_mtime < YOUNG_SECONDS:
                continue
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if try_lock(number):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(number)


@contextmanager
def _lock_file(folder: Path, deadline: float) -> Iterator[None]:
    path = folder / LOCK_FILE
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            _wait(folder, deadline)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _wait(folder: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"another process has been writing in {folder} for a minute; wait for it, or end it"
        )
    time.sleep(POLL_SECONDS)
