"""Reads regular files of a bounded size, writes files whole or not at all, and checks them before
the work whose result they will hold.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ssd_export.errors import UserError
from ssd_export.os_errors import WAYS_OUT, find, is_folder, os_error

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
OTHER_PLACE = "choose another place"
MAX_NAME = 200  # bytes of a name that something is appended to; file systems take 255
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BinaryIO:
    """The file opened for reading, links followed; never waits, as opening a named pipe would.

    Raises: OSError where it cannot be opened; UserError where it is not a regular file.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise UserError(f"{path} is {_kind(mode)}, not a file; put the file itself there")
    return os.fdopen(number, "rb")


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file.

    Args: most: bytes; a larger file is refused unread.
    Raises: OSError where it cannot be read; UserError for another kind of file, or a larger one.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most} bytes, which no file of its kind needs")
    return content


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write with a file that becomes path at the end, or what path links to; on failure or
    Ctrl-C path is as it was.

    Raises: UserError when the disk is full or not writable.
    """
    target = Path(os.path.realpath(path))
    _check_kind(target, path)
    partial = beside(target, "partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise os_error(error, "write", path) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes text to path; a reader sees the old text or the new, never a part. Raises: OSError."""
    partial = beside(path, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_file(path: Path) -> None:
    """Returns if a file can be written there. Raises: UserError for a folder, a pipe or a device,
    and for a folder around it that is missing or read-only.
    """
    target = Path(os.path.realpath(path))
    if is_folder(target, "write"):
        raise UserError(f"{path} is a folder; name a file in it, such as {path / path.name}")
    _check_kind(target, path)
    if not is_folder(target.parent, "write"):
        folder = target.parent if path.is_symlink() else path.parent
        raise UserError(f"there is no folder {folder} for {path.name}; make it, or {OTHER_PLACE}")
    if find(target, "write") is None:
        _try_name(target, path)
    check_folder(target.parent)


def _try_name(target: Path, shown: Path) -> None:
    """Makes the file and removes it: whether a name is too long, only the file system knows."""
    try:
        target.touch(exist_ok=False)
        target.unlink()
    except OSError as error:
        raise os_error(error, "write", shown) from error


def check_folder(folder: Path) -> None:
    """Returns if files can be made in the folder. Raises: UserError."""
    probe = folder / f".writable-{os.urandom(4).hex()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise os_error(error, "write in", folder) from error


def make_folder(folder: Path) -> None:
    """Makes the folder with its parents, or returns if it is there and writable. Raises:
    UserError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(error, "make the folder", folder) from error
    check_folder(folder)


@contextmanager
def disk_errors(target: Path, way_out: str = "choose another place") -> Iterator[None]:
    """Turns what a user can mend about a disk into one line; every other error passes.

    Args: target: what the block writes; way_out: where to write instead.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"no space left to write {target}; free some, or {way_out}") from error
        number = error.errno if isinstance(error, OSError) else None
        if not isinstance(error, OSError) or number == errno.ENOENT or number not in WAYS_OUT:
            raise
        name = error.filename
        culprit = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else target
        if not culprit.is_relative_to(target.parent):
            raise os_error(error, "read", culprit) from error
        raise os_error(error, "write", target, f"{WAYS_OUT[number]}, or {way_out}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota is full, whoever reports it: libraries wrap it in errors of their
    kind.
    """
    return getattr(error, "errno", None) in DISK_IS_FULL or "No space left on device" in str(error)


def beside(path: Path, what: str) -> Path:
    """A new name in the same folder, so that a rename is one step; no longer than names may be."""
    name = os.fsencode(path.name)[:MAX_NAME].decode("utf-8", "ignore")
    return path.with_name(f"{name}.{what}-{os.urandom(4).hex()}")


def reason(error: BaseException) -> str:
    """The operating system's words for an error."""
    return getattr(error, "strerror", None) or str(error)


def _check_kind(target: Path, shown: Path) -> None:
    """Raises UserError where something is that a file must not replace."""
    found = find(target, "write")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UserError(f"{shown} is {_kind(found.st_mode)}, not a file; {OTHER_PLACE}")


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")
