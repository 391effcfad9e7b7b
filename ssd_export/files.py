"""Files: read as regular files of a bounded size, written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ssd_export.errors import UserError

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
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"{path} is {kind}, not a file; put the file itself there")
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


def replace_text(path: Path, text: str) -> None:
    """Writes text to path; a reader sees the old text or the new, never a part. Raises: OSError."""
    partial = beside(path, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def beside(path: Path, what: str) -> Path:
    """A new name in the same folder, so that a rename is one step."""
    return path.with_name(f"{path.name}.{what}-{os.urandom(4).hex()}")


def reason(error: BaseException) -> str:
    """What the operating system says of an error, in its words."""
    return getattr(error, "strerror", None) or str(error)
