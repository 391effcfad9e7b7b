"""An export that is killed: never a bundle that loads and is wrong, and --resume ends where an
undisturbed one does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.synthetic_checkpoint import write_checkpoint
from ssd_export import locks
from ssd_export.bundle import JOURNAL, open_bundle
from ssd_export.errors import UserError
from ssd_export.export import exporter, journal, weights
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.export.journal import Journal, unfinished_folder
from tests.runtime.checkpoints import export_spec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "small", "small", "original", "fp16", num_layers=2
    )


def spec(model: Path, out: Path, **changes: object) -> ExportSpec:
    return export_spec(model, "h2o", out=out, dtype="fp16", weights="int4", force=True, **changes)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_bundle(export_bundle(spec(model, tmp_path_factory.mktemp("bundle") / "b"))).hash


def interrupted(
    model: Path, out: Path, after: int, error: BaseException, **changes: object
) -> None:
    """An export that fails when it makes the tensor after so many."""
    write, count = journal.WeightsStream.write, 0

    def fail(stream: journal.WeightsStream, data: memoryview) -> None:
        nonlocal count
        if count == after:
            write(stream, data[: len(data) // 2])
            raise error
        count += 1
        write(stream, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.WeightsStream, "write", fail)
        with pytest.raises((type(error), UserError)):
            export_bundle(spec(model, out, **changes))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL (POSIX)")
def test_killed_at_ten_moments_it_never_loads_wrong_and_resumes_to_the_same_bytes(
    model: Path, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    command = [sys.executable, "-m", "tests.export.killed_exports", str(model), str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *killed, last = map(json.loads, run.stdout.splitlines())
    assert len(killed) >= 10 and all(export["killed"] for export in killed)
    assert {found for export in killed for found in export["hashes"]} <= {undisturbed}
    assert last["hashes"] == [undisturbed] and os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")]
)
def test_what_can_be_resumed_is_kept_and_goes_on(
    model: Path,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    interrupted(model, tmp_path / "b", 9, error)
    assert os.listdir(tmp_path) == ["b.partial-export"]
    made = []
    write = journal.WeightsStream.write
    monkeypatch.setattr(
        journal.WeightsStream, "write", lambda stream, data: (made.append(1), write(stream, data))
    )
    assert open_bundle(export_bundle(spec(model, tmp_path / "b", resume=True))).hash == undisturbed
    lines = len(exporter.plan_export(spec(model, Path("unused"))).weights)
    assert len(made) == lines - 9 and os.listdir(tmp_path) == ["b"]


def test_a_failure_that_cannot_be_resumed_leaves_nothing(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "b", 9, UserError("NaN weights"))
    assert os.listdir(tmp_path) == []


def test_damage_since_the_interruption_is_written_again(
    model: Path, undisturbed: str, tmp_path: Path
) -> None:
    interrupted(model, tmp_path / "b", 12, KeyboardInterrupt())
    folder = unfinished_folder(tmp_path / "b")
    path = folder / "onnx" / weights.WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # as where a disk kept the length but not the bytes
    path.write_bytes(content)
    with open(folder / JOURNAL, "ab") as file:
        file.write(b'{"name": "cut in the mi')
    assert open_bundle(export_bundle(spec(model, tmp_path / "b", resume=True))).hash == undisturbed


def test_another_export_is_not_resumed(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "b", 5, KeyboardInterrupt())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError,
        match=r"was begun with weights \"int4\", and now it is \"none\".*leave out --resume",
    ):
        export_bundle(replace(spec(model, tmp_path / "b", resume=True), weights="none"))
    with pytest.raises(UserError, match="was begun with budget 0.2, and now it is 0.3"):
        export_bundle(replace(spec(model, tmp_path / "b", resume=True), budget=0.3))
    other = write_checkpoint(
        tmp_path.parent / "other", "small", "original", "fp16", seed=1, num_layers=2
    )
    with pytest.raises(UserError, match="was begun from another checkpoint"):
        export_bundle(spec(other, tmp_path / "b", resume=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_without_resume_it_begins_anew_and_resume_without_a_beginning_begins(
    model: Path, undisturbed: str, tmp_path: Path
) -> None:
    interrupted(model, tmp_path / "b", 5, KeyboardInterrupt())
    assert open_bundle(export_bundle(spec(model, tmp_path / "b"))).hash == undisturbed
    assert open_bundle(export_bundle(spec(model, tmp_path / "c", resume=True))).hash == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


@pytest.mark.skipif(locks.fcntl is None, reason="needs file locks (POSIX)")
def test_two_exports_to_one_folder_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "b", {}, resume=False):
        with pytest.raises(UserError, match="another export is writing"):
            Journal(tmp_path / "b", {}, resume=True)


@pytest.mark.skipif(locks.fcntl is None, reason="needs file locks (POSIX)")
def test_the_export_that_is_refused_does_not_offer_the_others_folder(
    model: Path, tmp_path: Path
) -> None:
    """It would say that what is finished may be deleted, while the other one writes there."""
    offered: list[Path] = []
    with Journal(unfinished_folder(tmp_path / "b"), {}, resume=False):
        with pytest.raises(UserError, match="another export is writing"):
            export_bundle(spec(model, tmp_path / "b"), kept=offered.append)
    assert offered == []


def test_the_first_layers_are_a_bundle_that_says_so(model: Path, tmp_path: Path) -> None:
    path = export_bundle(spec(model, tmp_path / "b", num_layers=1))
    config = json.loads((path / "ssd_config.json").read_text())
    assert (config["model"]["num_layers"], config["layers_of_the_model"]) == (1, 2)
    assert config["model_name"] == "small-1-layers" and open_bundle(path)
    with pytest.raises(UserError, match="--num-layers 3 is outside 1..2"):
        export_bundle(spec(model, tmp_path / "c", num_layers=3))


def test_too_little_disk_is_said_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export import machine

    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: 1 << 20)
    with pytest.raises(
        UserError, match=r"the bundle .* needs 6\d MiB of disk and 1 MiB are free.*--weights int4"
    ):
        export_bundle(spec(model, tmp_path / "b"))
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_refused_with_three_ways_out_unless_forced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.plan import memory

    monkeypatch.setattr(memory, "free_bytes", lambda: 50 << 20)
    with pytest.raises(UserError, match="exporting needs about .* 50 MiB are free") as refused:
        export_bundle(spec(model, tmp_path / "b"))
    assert str(refused.value).count(",") >= 2 and "--force-memory" in str(refused.value)
    assert os.listdir(tmp_path) == []
    assert open_bundle(export_bundle(spec(model, tmp_path / "b", force_memory=True)))
