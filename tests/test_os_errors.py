"""Each cause of an OSError has its sentence and its way out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssd_export.bundle.bundle import open_bundle
from ssd_export.bundle.write import check_target
from ssd_export.errors import UserError
from ssd_export.model.find import find_model
from ssd_export.os_errors import WAYS_OUT, find, is_file, is_folder, os_error
from tests.unprivileged import error_without_rights


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_number_has_one_line_with_reason_and_way_out(number: int) -> None:
    error = OSError(number, os.strerror(number), "/some/file")
    line = str(os_error(error, "read", "/some/file"))
    assert line.startswith("cannot read /some/file: ") and "\n" not in line
    assert os.strerror(number) in line
    assert line.endswith(WAYS_OUT.get(number, "check the path and its disk"))


def test_the_file_that_failed_is_named_beside_the_one_asked_for() -> None:
    error = OSError(errno.EACCES, "Permission denied", "/blobs/1234")
    assert "cannot read model.bin (/blobs/1234): Perm" in str(os_error(error, "read", "model.bin"))
    assert (
        str(os_error(OSError("gone"), "write", "out", "again")) == "cannot write out: gone; again"
    )


def test_a_very_long_name_is_cut() -> None:
    name = "x" * 5000
    line = str(os_error(OSError(errno.ENAMETOOLONG, "File name too long", name), "read", name))
    assert len(line) < 500 and "use shorter names" in line


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    assert is_file(tmp_path / "file") and not is_folder(tmp_path / "file")
    assert is_folder(tmp_path) and not is_file(tmp_path)
    assert not is_file(tmp_path / "pipe") and not is_folder(tmp_path / "pipe")
    assert find(tmp_path / "nothing") is None and find(tmp_path / "file" / "below") is None
    for path, words in (
        (tmp_path / "circle", "lead in a circle"),
        (tmp_path / ("n" * 300), "use shorter names"),
        (tmp_path / "nu\0ll", "no file has such a name"),
    ):
        with pytest.raises(UserError, match=words):
            find(path)


def test_a_folder_that_one_may_not_enter(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "inside").mkdir(parents=True)
    locked.chmod(0)
    try:
        line = error_without_rights(lambda: is_folder(locked / "inside"))
        assert "inside: Permission denied; run as a user who may" in line
    finally:
        locked.chmod(0o700)


def test_a_path_that_libraries_cannot_open_is_refused_before_any_work(tmp_path: Path) -> None:
    """ONNX Runtime and safetensors take UTF-8 alone; Python opens other names too."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xfct"))
    folder.mkdir()
    for open_it in (open_bundle, lambda path: check_target(path / "new", False), find_model):
        with pytest.raises(UserError, match=r"is not UTF-8.* use another name, or set LC_ALL"):
            open_it(folder if open_it is not find_model else str(folder))
