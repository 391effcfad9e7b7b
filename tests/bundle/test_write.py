"""Writing a bundle: whole or absent, and what is not the bundle's stays."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_export.bundle import (
    CONFIG,
    MANIFEST,
    open_bundle,
    swap,
    write_bundle,
    write_config,
)
from ssd_export.errors import UserError
from tests.bundle.small_bundles import (
    WEIGHTS_FILE,
    fill,
    one_line,
    small_config,
    tree,
    write,
)

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(KeyboardInterrupt):
        with write_bundle(tmp_path / "b", force=True) as folder:
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


@pytest.mark.parametrize("at_once", [True, False])
def test_a_failed_last_rename_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    write(tmp_path / "b")
    before, replace = tree(tmp_path), Path.replace
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_on_the_new_one(source: Path, target: Path) -> Path:
        if target.name == "b" and ".partial-" in source.name:
            raise full
        return replace(source, target)

    def fail(one: Path, other: Path) -> bool:
        if at_once:
            raise full
        return False

    monkeypatch.setattr(swap, "_exchange", fail)
    monkeypatch.setattr(Path, "replace", fail_on_the_new_one)
    with pytest.raises(UserError, match="no space left"):
        write(tmp_path / "b", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("damage", ["none", "manifest"])
def test_force_keeps_what_is_not_the_bundle_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool, damage: str
) -> None:
    if not at_once:
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    path = write(tmp_path / "b")
    open_bundle(path).add_files({"reports/verify.json": b"{}", "engines/a/x.engine": b"old"})
    foreign = {
        "README.md": b"a card",
        "notes/thesis.txt": b"years of work",
        "onnx/mine.txt": b"mine",
        "reports/by_hand.md": b"mine",
    }
    for name, content in foreign.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    (path / "elsewhere").symlink_to(tmp_path)
    (path / ".adding-left").mkdir()
    (path / ".adding-left" / "0").write_bytes(b"left by a killed process")
    if damage == "manifest":
        (path / MANIFEST).write_text("{")
    write(path, force=True, text="new")
    assert (path / "elsewhere").is_symlink() and os.listdir(tmp_path) == ["b"]
    (path / "elsewhere").unlink()
    written = open_bundle(path)
    assert written.file("onnx/decode_step.onnx").read_text() == "new"
    assert tree(path).keys() == {MANIFEST, *written.files, *foreign}
    assert all((path / name).read_bytes() == content for name, content in foreign.items())


def test_a_foreign_file_of_a_name_that_the_new_bundle_has_is_kept_under_another(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "b")
    with write_bundle(path, force=True) as folder:
        fill(folder, small_config())
        (folder / "head_map.json").write_text("the new bundle's")
        (path / "head_map.json").write_text("somebody's")
    kept = [file for file in path.iterdir() if file.name.startswith("head_map.json.earlier-")]
    assert len(kept) == 1 and kept[0].read_text() == "somebody's"
    assert open_bundle(path).file("head_map.json").read_text() == "the new bundle's"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders at once")
def test_no_moment_is_without_a_bundle(tmp_path: Path) -> None:
    """A reader that opens all the time while a writer replaces."""
    path = write(tmp_path / "b")
    code = f"""if True:
        from pathlib import Path
        from tests.bundle.small_bundles import write
        for index in range(40):
            write(Path({str(path)!r}), force=True, text=str(index))
    """
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    texts = set()
    while writer.poll() is None:
        texts.add(open_bundle(path).hash)
    assert writer.returncode == 0 and len(texts) > 1
    assert open_bundle(path).file("onnx/decode_step.onnx").read_text() == "39"


def test_an_earlier_bundle_that_a_killed_export_left_is_named(tmp_path: Path) -> None:
    """Killed between its two renames, where the system does not exchange folders at once."""
    old = write(tmp_path / "b").rename(tmp_path / "b.old-1234abcd")
    with pytest.raises(
        UserError, match="no bundle at .*b: make one .*b.old-1234abcd is an earlier"
    ):
        open_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="b.old-1234abcd is an earlier bundle.*rename it to"):
        write(tmp_path / "b", force=True)
    old.rename(tmp_path / "b")
    assert open_bundle(tmp_path / "b")


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


def test_a_file_size_limit_for_real(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs the file size limit of Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; this disk holds no file so large"):
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
    with pytest.raises(FileNotFoundError):
        with write_bundle(tmp_path / "b", force=False):
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
