"""Errors of the operating system as one sentence: what could not be done, why, and the way out.

Every cause has a way out that differs from the others': an unreadable file is not a damaged one,
and a file system without locks is not another process.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ssd_export.errors import UserError

PERMISSION = "run as a user who may, or change its permissions (chmod, chown)"
SPACE = "free some space, or choose another disk"
WAYS_OUT = {
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give a file, this is a folder",
    errno.EEXIST: "move what is there away, or choose another name",
    errno.ENOTEMPTY: "move what is there away, or choose another name",
    errno.ENAMETOOLONG: "use shorter names",
    errno.EILSEQ: "use other characters in the name",
    errno.ELOOP: "its symbolic links lead in a circle; point them at the file itself",
    errno.EXDEV: "choose a folder on the same disk",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "this disk holds no file so large (FAT, or ulimit -f); choose another",
    errno.EIO: "the disk or its connection fails; copy the files to another one",
    errno.ESTALE: "the network file system lost it; mount it again",
    errno.ETIMEDOUT: "the network file system does not answer; try again, or use a local disk",
    errno.EMFILE: "close other files of this process, or raise `ulimit -n`",
    errno.ENFILE: "close other programs: the whole system has no file left to open",
    errno.ENOMEM: "free memory",
    errno.EBUSY: "wait until no other program uses it",
    errno.ETXTBSY: "wait until no other program uses it",
    errno.ENOLCK: "this file system has no locks; choose a folder on a local disk",
    errno.ENOSYS: "this file system cannot do it; choose a folder on a local disk",
    errno.EOPNOTSUPP: "this file system cannot do it; choose a folder on a local disk",
    errno.ENXIO: "it is a pipe or a device, give a file",
    errno.EPIPE: "whoever reads the output is gone",
}
NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def os_error(error: OSError, doing: str, path: str | Path, way_out: str = "") -> UserError:
    """The one line for an OSError.

    Args: doing: "read", "write"; path: what was asked for; way_out: instead of the cause's own.
    """
    reason = error.strerror or str(error) or type(error).__name__
    named = error.filename
    culprit = os.fsdecode(named) if isinstance(named, (str, bytes)) else str(path)
    culprit = culprit if len(culprit) <= 300 else f"{culprit[:300]}..."
    via = "" if culprit == str(path) or len(str(path)) > 300 else f" ({culprit})"
    target = culprit if not via else path
    fix = way_out or WAYS_OUT.get(error.errno or 0, "check the path and its disk")
    return UserError(f"cannot {doing} {target}{via}: {reason}; {fix}")


def check_utf8(path: Path) -> None:
    """Raises UserError for a path that ONNX Runtime and safetensors, which take UTF-8, cannot
    open.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path} is not UTF-8, and ONNX Runtime and safetensors open no other path: use another"
            " name, or set LC_ALL=C.UTF-8 if only this terminal is not UTF-8"
        ) from None


def find(path: Path, doing: str = "read") -> os.stat_result | None:
    """The stat of a path, links followed; None where nothing is.

    Raises: UserError where that cannot be told, as in a folder that one may not enter.
    """
    try:
        return path.stat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise os_error(error, doing, path) from error
    except ValueError:  # a null byte
        raise UserError(f"cannot {doing} {str(path)!r}: no file has such a name") from None


def is_folder(path: Path, doing: str = "read") -> bool:
    """Whether a folder is there. Raises: UserError where that cannot be told."""
    found = find(path, doing)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path, doing: str = "read") -> bool:
    """Whether a regular file is there. Raises: UserError where that cannot be told."""
    found = find(path, doing)
    return found is not None and stat.S_ISREG(found.st_mode)
