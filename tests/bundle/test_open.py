"""Opening a bundle: every byte of it is checked, and what takes its place is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from ssd_export.bundle import (
    CONFIG,
    MANIFEST,
    hashes,
    open_bundle,
)
from ssd_export.errors import UserError
from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated
from tests.bundle.small_bundles import (
    WEIGHTS,
    WEIGHTS_FILE,
    one_line,
    tree,
    write,
)

PLACES = (
    ("schema_version",),
    ("files",),
    ("files", "tokenizer.json"),
    ("files", "tokenizer.json", "bytes"),
    ("files", "tokenizer.json", "sha256"),
)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def test_each_changed_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    for name in tree(path):
        good = (path / name).read_bytes()
        for offset in range(0, len(good), 1 if name == MANIFEST else max(7, len(good) // 50)):
            bad = bytearray(good)
            bad[offset] ^= 1
            (path / name).write_bytes(bytes(bad))
            with pytest.raises(UserError) as error:
                open_bundle(path)
            if name not in (MANIFEST, CONFIG):
                assert name in one_line(error) and "export it again" in one_line(error)
        (path / name).write_bytes(good)
    assert open_bundle(path)


@pytest.mark.parametrize("name", ["onnx/decode_step.onnx", MANIFEST, CONFIG, WEIGHTS_FILE])
def test_a_missing_or_cut_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "b")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match="export it again") as cut:
        open_bundle(path)
    (path / name).unlink()
    with pytest.raises(UserError, match="is missing|no bundle at") as missing:
        open_bundle(path)
    if name != CONFIG:
        assert name in one_line(cut) and name in one_line(missing)


def test_a_future_schema_names_the_tool_version(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, "schema_version": 7, "tool_version": "3.2.0"}))
    with pytest.raises(
        UserError,
        match=r"schema version 7 and this is ssd-export 0\.1\.0, .* use ssd-export 3\.2\.0",
    ) as error:
        open_bundle(path)
    one_line(error)


def test_an_older_schema_names_the_command_that_exports_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a b")
    values = json.loads((path / CONFIG).read_text())
    values |= {"schema_version": 1, "dtype": "float16"}
    values["graphs"] = {"decode_step": "as an older version wrote it"}
    values["policy"] |= {"name": "h2o", "budget": 0.35, "kv_dtype": "int8"}
    (path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match="schema version 1, from an earlier ssd-export") as error:
        open_bundle(path)
    one_line(error)
    command = str(error.value).split("make it again with `")[1]
    assert command == (
        f"ssd-export export --model {values['model_name']} --policy h2o --budget 0.35 --dtype fp16"
        f" --weights none --kv-dtype int8 --out '{path}' --force`"
    )


@pytest.mark.parametrize(
    "content", ["[]", "{}", "{", "\xff", "[" * 100_000, '{"schema_version": "1"}']
)
def test_a_foreign_folder_is_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG).write_bytes(content.encode("latin-1"))
    with pytest.raises(
        UserError, match="expected an object|not JSON|nested too deeply|schema.version"
    ) as error:
        open_bundle(tmp_path)
    one_line(error)
    with pytest.raises(UserError, match="no bundle at .*: make one with `ssd-export export`"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/../../b", "a//b", "c:\\b", "a\\b", "c:b", "a\x00b", ""],
)
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "b")
    entry = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    add_entry(path, name, entry)
    with pytest.raises(UserError, match="manifest.json is damaged: its entry of .* names no file"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("\ud800", {}, "manifest.json is damaged"),
        ("a", {"bytes": -1}, "its entry of 'a' names no file"),
        ("a", {"sha256": "0" * 63 + "G"}, "its entry of 'a' names no file"),
    ],
)
def test_an_entry_that_is_none_is_damage(
    tmp_path: Path, name: str, changed: dict, message: str
) -> None:
    path = write(tmp_path / "b")
    add_entry(path, name, {"bytes": 0, "sha256": "0" * 64, **changed})
    with pytest.raises(UserError, match=message):
        open_bundle(path)


def add_entry(path: Path, name: str, entry: dict) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = entry
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def test_files_that_the_manifest_does_not_name_are_never_handed_out(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    (path / "README.md").write_text("from a hub")
    with pytest.raises(UserError, match="has no README.md"):
        open_bundle(path).file("README.md")


def test_large_files_are_hashed_once_until_they_change(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = hashes.sha256
    monkeypatch.setattr(
        hashes, "sha256", lambda path, *told: (hashed.append(path.name), sha256(path, *told))[1]
    )
    size = len(WEIGHTS)
    monkeypatch.setattr(hashes, "ALWAYS_HASHED_BYTES", size)
    path = write(tmp_path / "b")
    hashed.clear()
    open_bundle(path)
    assert "weights.safetensors" not in hashed and "tokenizer.json" in hashed
    times = (path / WEIGHTS_FILE).stat()
    (path / WEIGHTS_FILE).write_bytes(bytes(size))
    while (
        path / WEIGHTS_FILE
    ).stat().st_ctime_ns == times.st_ctime_ns:  # until the disk's clock has moved on
        (path / WEIGHTS_FILE).touch()
    os.utime(
        path / WEIGHTS_FILE, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # hides the change from mtime
    with pytest.raises(UserError, match="weights.safetensors was changed"):
        open_bundle(path)
    for broken in ("{", "[]"):
        (own_home / "ssd-export" / "sha256.json").write_text(broken)
        (path / WEIGHTS_FILE).write_bytes(WEIGHTS)
        open_bundle(path)
        hashed.clear()
        open_bundle(path)
        assert "weights.safetensors" not in hashed


# While it is open


def test_a_bundle_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    write(tmp_path / "b", force=True, text="another")
    for use in (bundle.file, bundle.read):
        with pytest.raises(
            UserError, match=r"b was replaced, changed or deleted .*; open it again"
        ):
            use("onnx/decode_step.onnx")
    assert open_bundle(tmp_path / "b").read("onnx/decode_step.onnx") == b"another"


def test_a_bundle_that_is_deleted_is_noticed(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    shutil.rmtree(bundle.path)
    with pytest.raises(UserError, match="was replaced, changed or deleted while it was open"):
        bundle.file("tokenizer.json")
    with pytest.raises(UserError, match="was deleted while it was open"):
        bundle.add_files({"reports/verify.json": b"{}"})


@pytest.mark.parametrize("when", ["before", "inside", "inside, and the library fails"])
def test_what_a_library_opens_by_itself_is_what_was_checked(tmp_path: Path, when: str) -> None:
    bundle = open_bundle(write(tmp_path / "b"))

    def overwrite() -> None:
        (bundle.path / WEIGHTS_FILE).write_bytes(bytes(len(WEIGHTS)))

    with bundle.using("onnx/decode_step.onnx", WEIGHTS_FILE) as path:
        assert path.read_text() == "graph"
    if when == "before":
        overwrite()
    with pytest.raises(UserError, match="weights.safetensors is not the file that was opened"):
        with bundle.using("onnx/decode_step.onnx", WEIGHTS_FILE):
            overwrite()
            if when.endswith("fails"):
                raise RuntimeError("a header that is none")


def test_links_and_permissions_are_no_change(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    os.link(bundle.file(WEIGHTS_FILE), tmp_path / "link")
    bundle.file(WEIGHTS_FILE).chmod(0o444)
    assert bundle.file(WEIGHTS_FILE)


def test_a_relative_path_holds_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    bundle = open_bundle("b")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert bundle.path == Path("b") and bundle.file("tokenizer.json").read_text() == "{}"
    assert "reports/a.json" in bundle.add_files({"reports/a.json": b"{}"}).files
    assert os.listdir(tmp_path / "other") == []


# Parts that are missing, and things that are no files


def test_engines_and_reports_that_were_not_copied_matter_to_nothing_else(tmp_path: Path) -> None:
    files = {
        "engines/a/x.engine": b"1",
        "engines/a/engine.json": b"{}",
        "reports/verify.json": b"2",
    }
    path = open_bundle(write(tmp_path / "b")).add_files(files).path
    shutil.rmtree(path / "engines")
    bundle = open_bundle(path)
    assert bundle.file("onnx/decode_step.onnx") and bundle.file("reports/verify.json")
    with pytest.raises(UserError, match="x.engine is missing; build the engines again: ssd-export"):
        bundle.file("engines/a/x.engine")
    (path / "reports" / "verify.json").write_bytes(b"3")
    faults = [f"{name} is missing" for name in sorted(files)[:2]] + ["verify.json was changed"]
    assert all(what in found for what, found in zip(faults, bundle.faults(), strict=True))
    again = bundle.add_files({"engines/a/x.engine": b"4"}, instead_of=list(files))
    assert again.faults() == [] and again.read("engines/a/x.engine") == b"4"


@pytest.mark.parametrize("name", [CONFIG, MANIFEST, "onnx/decode_step.onnx", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / "b")
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero")
    with pytest.raises(
        UserError, match="a named pipe|a folder|a device|the manifest says"
    ) as error:
        open_bundle(path)
    assert name in one_line(error)


@pytest.mark.parametrize(
    "place, wrong", [(place, wrong) for place in PLACES for wrong in (REMOVED, *WRONG_VALUES)]
)
def test_a_manifest_with_one_wrong_value_is_refused(
    tmp_path_factory: pytest.TempPathFactory, small: Path, place: tuple, wrong: str
) -> None:
    text = (small / MANIFEST).read_text()
    (small / MANIFEST).write_bytes(mutated(text, place, wrong))
    try:
        with pytest.raises(UserError, match="manifest.json is damaged|has no tokenizer") as error:
            open_bundle(small)
        assert one_line(error).isprintable() and len(str(error.value)) < 1000
    finally:
        (small / MANIFEST).write_text(text)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "b")
