"""Files are written whole, through links, under names as long as they may be, and never over what
is no file; each cause of a failure has its sentence.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssd_export.errors import UserError
from ssd_export.files import beside, check_file, disk_errors, is_disk_full, write_file

LONGEST = "x" * 251 + ".png"  # 255 bytes, what file systems take


def put(path: Path, content: bytes = b"new") -> None:
    write_file(path, lambda file: file.write(content))


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    check_file(tmp_path / LONGEST)
    put(tmp_path / LONGEST)
    assert (tmp_path / LONGEST).read_bytes() == b"new" and os.listdir(tmp_path) == [LONGEST]
    for act in (check_file, put):
        with pytest.raises(UserError, match="File name too long; use shorter names"):
            act(tmp_path / f"x{LONGEST}")


def test_names_beside_are_legal(tmp_path: Path) -> None:
    for name in (LONGEST, "é" * 127, "a"):
        made = beside(tmp_path / name, "partial")
        made.touch()
        assert made.parent == tmp_path and made.name != name


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "target.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("target.png")
    check_file(tmp_path / "link.png")
    put(tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes() == b"new"
    (tmp_path / "dangling.png").symlink_to(tmp_path / "no" / "folder.png")
    with pytest.raises(UserError, match="there is no folder .*no for dangling.png"):
        check_file(tmp_path / "dangling.png")


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, what in (
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "folder", "is a folder"),
    ):
        for act in (check_file, put):
            with pytest.raises(UserError, match=what):
                act(path)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left to write .*b; free some"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "no space left to write",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write .*b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; choose a folder"),
        (OSError(errno.EIO, "Input/output error"), "the disk or its connection fails"),
    ],
)
def test_each_cause_has_its_sentence(tmp_path: Path, error: Exception, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        with disk_errors(tmp_path / "b"):
            raise error
    assert "choose another place" in str(raised.value) and "\n" not in str(raised.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone"), ValueError("a bug"), UserError("said")):
        with pytest.raises(type(error)):
            with disk_errors(tmp_path):
                raise error
    assert not is_disk_full(ValueError("full")) and is_disk_full(OSError(errno.EDQUOT, ""))
