"""The bundle that was exported last from a folder, and every broken form of the note of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssd_export.bundle import (
    latest_bundle,
    remember_latest,
    resolve_bundle,
)
from ssd_export.errors import UserError
from tests.bundle.small_bundles import (
    one_line,
    write,
)


def test_the_latest_bundle_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `ssd-export export`"):
        resolve_bundle(None)
    remember_latest(write(Path("bundles/a")))
    assert resolve_bundle(None) == Path("bundles/a") == latest_bundle()
    remember_latest(write(tmp_path / "elsewhere"))
    assert resolve_bundle(None) == tmp_path / "elsewhere"
    assert resolve_bundle("x") == Path("x")
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="elsewhere is gone"):
        resolve_bundle(None)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe", "names no bundle .*utf-8"),
        (b"x" * 100_000, "has more than 65536 bytes"),
        (b"x" * 5_000, "names no bundle .*File name too long"),
        (b"/".join([b"x" * 200] * 100), "names no bundle .*File name too long"),
        (b"a\x00b", "names no bundle"),
        (b"a\nb", "names no bundle"),
        (b"\x1b[2J", "names no bundle"),
    ],
)
def test_every_broken_note_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bundles").mkdir()
    Path("bundles/.latest").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        resolve_bundle(None)
    assert "give a bundle's path, or delete it" in one_line(error) and len(str(error.value)) < 500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["pipe", "folder", "empty", "no folder"])
def test_a_note_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "no folder":
        Path("bundles").touch()
    else:
        Path("bundles").mkdir()
    note = Path("bundles/.latest")
    match kind:
        case "pipe":
            os.mkfifo(note)
        case "folder":
            note.mkdir()
        case "empty":
            note.touch()
    expected = {"pipe": "is a named pipe", "folder": "is a folder"}.get(
        kind, "no bundle was exported"
    )
    with pytest.raises(UserError, match=expected):
        resolve_bundle(None)
