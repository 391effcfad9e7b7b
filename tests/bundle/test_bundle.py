"""Bundles: whole or absent, and every byte vouched for."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_export.bundle import (
    CONFIG,
    MANIFEST,
    hashes,
    latest_bundle,
    open_bundle,
    remember_latest,
    resolve_bundle,
    write_bundle,
    write_config,
)
from ssd_export.errors import UserError
from tests.bundle.small_bundles import WEIGHTS, fill, small_config

WEIGHTS_FILE = "onnx/weights.safetensors"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def write(target: Path, force: bool = False, text: str = "graph") -> Path:
    with write_bundle(target, force) as folder:
        fill(folder, small_config())
        (folder / "onnx" / "decode_step.onnx").write_text(text)
    return target


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Writing


def test_what_is_written_is_read(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "new" / "parents" / "b"))
    assert bundle.config == small_config()
    graphs = sorted(f"onnx/{name}.onnx" for name in bundle.config.graphs)
    assert list(bundle.files) == [*graphs, WEIGHTS_FILE, CONFIG, "tokenizer.json"]
    assert bundle.file("onnx/decode_step.onnx").read_text() == "graph"
    assert os.listdir(tmp_path / "new" / "parents") == ["b"]


def test_the_hash_is_that_of_a_sha256sum_listing(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))
    lines = [
        f"{hashlib.sha256((bundle.path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(bundle.files)
    ]
    assert bundle.hash == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert open_bundle(write(tmp_path / "c")).hash == bundle.hash
    assert open_bundle(write(tmp_path / "d", text="other")).hash != bundle.hash


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), UserError("NaN weights"), SystemExit(143)]
)
def test_nothing_is_left_when_the_work_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        with write_bundle(tmp_path / "new" / "b", force=False) as folder:
            (folder / "half.onnx").write_text("half")
            raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_target_is_refused_before_the_work(tmp_path: Path) -> None:
    write(tmp_path / "b")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="exists; replace it with --force") as error:
        with write_bundle(tmp_path / "b", force=False):
            pytest.fail("the work began")
    one_line(error)
    assert tree(tmp_path) == before


def test_force_replaces_a_bundle_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "b")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "b", force=True) as folder:
        write_config(folder, small_config())
        assert open_bundle(tmp_path / "b")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before
    assert (
        open_bundle(write(tmp_path / "b", force=True, text="new"))
        .file("onnx/decode_step.onnx")
        .read_text()
        == "new"
    )
    assert os.listdir(tmp_path) == ["b"]


def test_a_failed_last_rename_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b")
    before, replace = tree(tmp_path), os.replace

    def fail_on_the_new_one(source: Path, target: Path) -> None:
        if ".partial-" in str(source) and Path(target).name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new_one)
    with pytest.raises(UserError, match="no space left"):
        write(tmp_path / "b", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file", "root"])
def test_force_never_replaces_what_is_no_bundle(tmp_path: Path, kind: str) -> None:
    target = {"folder": tmp_path, "file": tmp_path / "thesis.txt", "root": Path("/")}[kind]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a bundle|is a file") as error:
        write(target, force=True)
    one_line(error)
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_empty_folder_and_a_link_are_good_targets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert open_bundle(write(tmp_path / "empty"))
    assert open_bundle(write(tmp_path / "link")).path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "empty", "link"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("safetensors: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="no space left to write .*b; free some") as raised:
        with write_bundle(tmp_path / "b", force=False) as folder:
            (folder / "half").write_text("half")
            raise error
    one_line(raised)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs the file size limit of Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match="no space left"):
            write(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["/proc/b", "file/b", "x" * 300])
def test_an_unwritable_place_is_one_line(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write|cannot make|is a file") as error:
        write(tmp_path / target)
    one_line(error)
    assert os.listdir(tmp_path) == ["file"]


def test_an_unreadable_source_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    source = tmp_path.parent / "model.safetensors"
    with pytest.raises(UserError, match="model.safetensors: Permission denied"):
        with write_bundle(tmp_path / "b", force=False):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))


def test_other_errors_are_bugs_and_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_bundle(tmp_path / "b", force=False):
        (tmp_path / "no such file").read_text()
    with pytest.raises(UserError, match="left no ssd_config.json"):
        with write_bundle(tmp_path / "b", force=False):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path: Path, number: int) -> None:
    code = """if True:
        import signal, sys, time
        from pathlib import Path
        from ssd_export.bundle import write_bundle
        from ssd_export.cli.main import _terminate
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with write_bundle(Path(sys.argv[1]), False) as folder:
            (folder / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(600)
            print("nothing stopped it", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout and process.stdout.readline() == b"writing\n"
    process.send_signal(number)
    assert process.communicate()[0] == b"" and process.returncode != 0
    assert os.listdir(tmp_path) == []


# Opening


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
    "name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "c:\\b", "a\x00b", "", "\ud800"]
)
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "b")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        open_bundle(path)


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
    monkeypatch.setattr(hashes, "sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
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


# Adding


def test_added_files_are_vouched_for_and_leave_the_hash(tmp_path: Path) -> None:
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
        open_bundle(bundle.path)


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
    replace, calls = os.replace, iter(range(10))

    def interrupted(source: Path, target: Path) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle.add_files({"reports/a.json": b"new", "reports/b.json": b"new"})
    assert open_bundle(bundle.path).hash == bundle.hash


# The latest


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
