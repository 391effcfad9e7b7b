"""An export that is killed: never a bundle that loads and is wrong, and --resume ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ssd_export.bundle import JOURNAL, open_bundle
from ssd_export.errors import UserError
from ssd_export.evaluate.synthetic_checkpoint import write_checkpoint
from ssd_export.export import exporter, journal, weights
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.export.journal import Journal, unfinished_folder
from tests.runtime.checkpoints import export_spec

ROOT = Path(__file__).parents[2]
# An export in a process of its own that can be killed in the middle of the weights: each tensor takes a while.
SLOW_EXPORT = """
import sys, time
from pathlib import Path
from ssd_export.export import journal, weights
from ssd_export.export.exporter import ExportSpec, export_bundle
write = journal.WeightsStream.write
def slow_write(stream, data):
    half = len(data) // 2
    write(stream, data[:half])
    time.sleep(float(sys.argv[4]) / 2)
    write(stream, data[half:])
    time.sleep(float(sys.argv[4]) / 2)
journal.WeightsStream.write = slow_write
def spec(model, out, resume):
    return ExportSpec(model, "h2o", 0.2, None, None, None, None, None, 3, 32, "fp16", Path(out), True,
                      weights="int4", resume=resume)
print("begun", flush=True)
export_bundle(spec(sys.argv[1], sys.argv[2], sys.argv[3] == "resume"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "small", "small", "original", "fp16", num_layers=2)


def spec(model: Path, out: Path, **changes: object) -> ExportSpec:
    return export_spec(model, "h2o", out=out, dtype="fp16", weights="int4", force=True, **changes)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_bundle(export_bundle(spec(model, tmp_path_factory.mktemp("bundle") / "b"))).hash


def interrupted(model: Path, out: Path, after: int, error: BaseException, **changes: object) -> None:
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


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL (POSIX)")
def test_killed_at_ten_moments_it_never_loads_wrong_and_resumes_to_the_same_bytes(
    model: Path, undisturbed: str, tmp_path: Path
) -> None:
    moments, finished_once = random.Random(0), 0
    out, mode = tmp_path / "b", "begin"
    for _ in range(10):
        command = [sys.executable, "-c", SLOW_EXPORT, str(model), str(out), mode, "0.02"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert process.stdout and process.stdout.readline() == b"begun\n"
        time.sleep(moments.uniform(0.05, 1.2))
        process.kill()
        process.wait()
        for place in (out, unfinished_folder(out)):
            try:
                assert open_bundle(place).hash == undisturbed
                finished_once += 1
            except UserError:
                pass
        mode = "resume"
    assert open_bundle(export_bundle(spec(model, out, resume=True))).hash == undisturbed
    assert os.listdir(tmp_path) == ["b"]
    assert finished_once < 10, "the export was too fast to be killed in the middle"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_what_can_be_resumed_is_kept_and_goes_on(
    model: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    interrupted(model, tmp_path / "b", 9, error)
    assert os.listdir(tmp_path) == ["b.partial-export"]
    made = []
    write = journal.WeightsStream.write
    monkeypatch.setattr(journal.WeightsStream, "write", lambda stream, data: (made.append(1), write(stream, data)))
    assert open_bundle(export_bundle(spec(model, tmp_path / "b", resume=True))).hash == undisturbed
    lines = len(weights.plan_weights(*plan_of(model)))
    assert len(made) == lines - 9 and os.listdir(tmp_path) == ["b"]


def plan_of(model: Path) -> tuple:
    plan = exporter.plan_export(spec(model, Path("unused")))
    return plan.checkpoint, plan.table, exporter.DTYPES["fp16"], "int4"


def test_a_failure_that_cannot_be_resumed_leaves_nothing(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "b", 9, UserError("NaN weights"))
    assert os.listdir(tmp_path) == []


def test_damage_since_the_interruption_is_written_again(model: Path, undisturbed: str, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"was begun with weights int4, and now it is none.*leave out --resume"):
        export_bundle(replace(spec(model, tmp_path / "b", resume=True), weights="none"))
    with pytest.raises(UserError, match="was begun with budget 0.2, and now it is 0.3"):
        export_bundle(replace(spec(model, tmp_path / "b", resume=True), budget=0.3))
    other = write_checkpoint(tmp_path.parent / "other", "small", "original", "fp16", seed=1, num_layers=2)
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


@pytest.mark.skipif(journal.fcntl is None, reason="needs file locks (POSIX)")
def test_two_exports_to_one_folder_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "b", {}, resume=False):
        with pytest.raises(UserError, match="another export is writing"):
            Journal(tmp_path / "b", {}, resume=True)


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
    from ssd_export.plan import machine

    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: 1 << 20)
    with pytest.raises(UserError, match=r"the bundle .* needs 6\d MiB of disk and 1 MiB are free.*--weights int4"):
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
