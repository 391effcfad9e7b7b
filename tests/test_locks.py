"""Locks of folders and scratch folders, with and without flock."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ssd_export import locks
from ssd_export.errors import UserError
from ssd_export.export.journal import Journal
from ssd_export.locks import LOCK_FILE, locked, scratch_folder, try_lock

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="needs flock (POSIX)")


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(number: int, how: int) -> None:
        raise OSError(getattr(errno, request.param), request.param)

    monkeypatch.setattr(locks.fcntl, "flock", flock)


def test_a_second_holder_waits_and_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    with locked(tmp_path):
        with pytest.raises(UserError, match="another process has been writing in"):
            with locked(tmp_path):
                pytest.fail("two holders")
    with locked(tmp_path):
        assert os.listdir(tmp_path) == []


def test_without_flock_a_file_is_the_lock(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [LOCK_FILE]
        with pytest.raises(UserError, match="another process has been writing in"):
            with locked(tmp_path):
                pytest.fail("two holders")
        os.utime(tmp_path / LOCK_FILE, (0, 0))  # left by a killed process, long ago
        with locked(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


def test_an_export_needs_no_locks(tmp_path: Path, without_flock: None) -> None:
    """A file system without flock is not another export."""
    with Journal(tmp_path / "b.partial-export", {"budget": 0.2}, resume=False) as journal:
        assert not journal.is_resumed


def test_other_errors_of_flock_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(number: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match="Input/output"):
        try_lock(file.fileno())


def test_a_scratch_folder_goes_whatever_happens(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), RuntimeError("bug"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error)):
            with scratch_folder(tmp_path, ".work-") as folder:
                (folder / "file").write_text("half")
                raise error
    assert os.listdir(tmp_path) == []


def test_only_folders_of_dead_makers_go(tmp_path: Path) -> None:
    dead, young, other = (tmp_path / name for name in (".work-dead", ".work-young", "work"))
    for folder in (dead, young, other):
        folder.mkdir()
    (tmp_path / ".work-file").touch()
    (tmp_path / ".work-link").symlink_to(other)
    for path in (dead, other, tmp_path / ".work-file"):
        os.utime(path, (0, 0))
    with scratch_folder(tmp_path, ".work-") as alive:
        os.utime(alive, (0, 0))
        with scratch_folder(tmp_path, ".work-"):
            assert alive.exists()
    assert sorted(os.listdir(tmp_path)) == [".work-file", ".work-link", ".work-young", "work"]
