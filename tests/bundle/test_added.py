"""Engines and reports are added by several processes at once, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_export import locks
from ssd_export.bundle import (
    CONFIG,
    MANIFEST,
    open_bundle,
)
from ssd_export.errors import UserError
from ssd_export.locks import locked
from tests.bundle.small_bundles import (
    write,
)

ROOT = Path(__file__).parents[2]


def test_added_files_are_checked_and_leave_the_hash(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    engine = bundle.path / "engine.tmp"
    engine.write_bytes(b"engine")
    added = bundle.add_files(
        {"engines/rtx-sm90/decode_step.engine": engine, "reports/verify.json": b"{}"}
    )
    added = added.add_files({"reports/verify.json": b'{"level": "ops"}'})
    again = open_bundle(bundle.path)
    assert again == added and again.hash == bundle.hash
    assert again.file("engines/rtx-sm90/decode_step.engine").read_bytes() == b"engine"
    assert again.file("reports/verify.json").read_bytes() == b'{"level": "ops"}'
    assert not engine.exists() and not [
        path for path in bundle.path.iterdir() if path.name.startswith(".")
    ]
    (bundle.path / "engines/rtx-sm90/decode_step.engine").write_bytes(b"Engine")
    with pytest.raises(UserError, match="decode_step.engine was changed"):
        open_bundle(bundle.path).file("engines/rtx-sm90/decode_step.engine")


def test_files_go_that_others_take_the_place_of(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b")).add_files(
        {"engines/a": b"1", "engines/b": b"1", "reports/c": b"1"}
    )
    after = bundle.add_files({"engines/a": b"2"}, instead_of=["engines/a", "engines/b"])
    assert open_bundle(bundle.path) == after and after.hash == bundle.hash
    assert after.file("engines/a").read_bytes() == b"2" and "reports/c" in after.files
    assert "engines/b" not in after.files and not (bundle.path / "engines/b").exists()
    with pytest.raises(ValueError, match="only files under"):
        bundle.add_files({}, instead_of=[CONFIG])


@pytest.mark.parametrize(
    "name", ["onnx/decode_step.onnx", CONFIG, "reports/../weights.bin", "engines", "reports/"]
)
def test_only_engines_and_reports_are_added(tmp_path: Path, name: str) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    with pytest.raises(ValueError, match="only files under"):
        bundle.add_files({name: b"x"})
    assert open_bundle(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_addition_leaves_a_bundle_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    bundle = open_bundle(write(tmp_path / "b")).add_files(
        {"reports/a.json": b"old", "reports/b.json": b"old"}
    )
    replace, calls = Path.replace, iter(range(10))

    def interrupted(source: Path, target: Path) -> Path:
        if next(calls) == call:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle.add_files({"reports/a.json": b"new", "reports/b.json": b"new"})
    assert open_bundle(bundle.path).hash == bundle.hash


def test_additions_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    """What verify, bench and build-engine do at once, with readers that open meanwhile."""
    path = write(tmp_path / "b")
    code = """if True:
        import sys
        from ssd_export.bundle import open_bundle
        bundle = open_bundle(sys.argv[1])
        for index in range(12):
            own = f"reports/{sys.argv[2]}-{index}.json"
            bundle.add_files({own: b"{}", "reports/same.json": b"1"})
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(number)], cwd=ROOT)
        for number in range(4)
    ]
    while any(writer.poll() is None for writer in writers):
        open_bundle(path)
    assert [writer.returncode for writer in writers] == [0] * 4
    bundle = open_bundle(path)
    wanted = {f"reports/{number}-{index}.json" for number in range(4) for index in range(12)}
    assert wanted <= bundle.files.keys() and bundle.faults() == []
    assert sorted(os.listdir(path)) == [MANIFEST, "onnx", "reports", CONFIG, "tokenizer.json"]


def test_what_was_made_from_an_earlier_bundle_is_not_added_to_a_new_one(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    write(tmp_path / "b", force=True, text="another")
    with pytest.raises(UserError, match="b was replaced meanwhile"):
        bundle.add_files({"reports/verify.json": b"{}"})
    assert "reports/verify.json" not in open_bundle(tmp_path / "b").files
    assert not (tmp_path / "b" / "reports").exists()


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    dead, alive = bundle.path / ".adding-dead", bundle.path / ".adding-alive"
    partial = bundle.path / f"{MANIFEST}.partial-12345678"
    partial.write_text("{")
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "0").write_bytes(b"x")
    for path in (dead, alive, partial):
        os.utime(path, (0, 0))
    with locked(alive):
        bundle.add_files({"reports/a.json": b"{}"})
    assert not dead.exists() and alive.exists() and not partial.exists()


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "try_lock", lambda number: None)
    bundle = open_bundle(write(tmp_path / "b")).add_files({"reports/a.json": b"{}"})
    assert "reports/a.json" in open_bundle(bundle.path).files
    assert not (bundle.path / locks.LOCK_FILE).exists()
