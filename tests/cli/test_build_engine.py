"""build-engine on the command line: what it plans, what it writes, and one line for everything a
user can mend.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.cli.main import main
from ssd_export.tensorrt import flavors
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt import target as targets
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

ROOT = Path(__file__).parents[2]
NEEDS_RTX = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Runs the verb in an empty folder on a machine without a GPU; its exit code, stdout and
    stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_plan, "gpu_here", lambda: None)
    old = signal.getsignal(signal.SIGTERM)

    def call(*args: object) -> SimpleNamespace:
        capsys.readouterr()  # what making the checkpoint printed
        with pytest.raises(SystemExit) as left:
            main(["build-engine", *map(str, args)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=captured.out, err=captured.err)

    yield call
    signal.signal(signal.SIGTERM, old)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return shutil.copytree(
        bundle(checkpoint(TinyJanus(num_layers=1)), "streaming-llm", dtype="fp16"),
        tmp_path / "bundle",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (("--target", "gameboy"), "unknown --target 'gameboy'; choose auto or one of"),
        (
            ("--flavor", "trt"),
            "unknown --flavor 'trt'; choose one of auto, tensorrt, tensorrt-rtx",
        ),
        (("--plugin", "yes"), "unknown --plugin 'yes'; choose one of auto, on, off"),
        (("--batch", "4"), "--batch 4 is not MIN:OPT:MAX"),
        (("--target", "cpu"), "needs no engine: ssd-export generate --runner ort"),
        (
            ("--target", "rtx", "--flavor", "tensorrt"),
            "--flavor tensorrt does not build for rtx; use --flavor tensorrt-rtx",
        ),
        (
            ("--target", "jetson-orin", "--plugin", "off"),
            "copy the bundle there and run ssd-export build-engine",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    run: Run, path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("--bundle", path, *options)
    assert result.code == 1 and message in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


def test_without_tensorrt_the_extra_is_named(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (build_plan, flavors, targets):
        monkeypatch.setattr(module, "is_installed", lambda name: False)
    result = run("--bundle", path)
    assert result.code == 1 and "pip install ssd-export[rtx]" in result.err


def test_without_a_bundle_it_says_where_one_comes_from(run: Run, tmp_path: Path) -> None:
    assert "run `ssd-export export`" in run().err
    assert "no bundle at" in run("--bundle", tmp_path / "nowhere").err


@NEEDS_RTX
def test_a_dry_run_says_everything_and_writes_nothing(run: Run, path: Path) -> None:
    before = sorted(path.rglob("*"))
    result = run(
        "--bundle",
        path,
        "--dry-run",
        "--batch",
        "1:2:3",
        "--plugin",
        "off",
        "--timing-cache",
        "t.cache",
        "--top-k",
    )
    assert result.code == 0 and result.out == "", result.err
    for part in (
        "target: rtx",
        "flavor: tensorrt-rtx 1.",
        "decode step: kv-update (no plugin: --plugin off)",
        "prefill: keys and values written into the caches",
        "1 to 3 images, the decode step tuned for 1 and 2",
        "up to 32 tokens",
        "graphs: prefill, decode_step, image_decoder, prefill_top_k, decode_step_top_k",
        "memory: about",
        "engines/tensorrt-rtx1.",
        "--timing-cache is not used",
    ):
        assert part in result.err
    assert sorted(path.rglob("*")) == before


@NEEDS_RTX
def test_engines_stand_in_the_bundle(run: Run, path: Path) -> None:
    result = run("--bundle", path, "--plugin", "off", "--batch", "1:1:1", "--target", "ada")
    assert result.code == 0, result.err
    folder = Path(result.out.strip())
    assert folder.parent == path / "engines" and "-sm89-" in folder.name
    values = json.loads((folder / "engine.json").read_text())
    files = open_bundle(path).files
    for name, graph in values["graphs"].items():
        stored = files[f"engines/{folder.name}/{graph['engine']}"]
        assert (stored.sha256, stored.bytes) == (graph["sha256"], graph["bytes"])
        assert files[graph["onnx"]].sha256 == graph["onnx_sha256"]
        assert f"\n{name}: " in result.err
    assert "s left\n" in result.err, "each engine is told as it is built"


# build-engine that is interrupted by itself, so at the same moment however fast the machine is: at
# a phase of TensorRT's.
INTERRUPTED = """
import os, signal, sys
from ssd_export.tensorrt.build_progress import Phases
from ssd_export.cli.main import main
begin, moments = Phases.start, [int(sys.argv[1])]
def start(phases, *phase):
    moments[0] -= 1
    if not moments[0]:
        os.kill(os.getpid(), signal.SIGINT)
    begin(phases, *phase)
Phases.start = start
# A shell that runs the tests in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
main(["build-engine", *sys.argv[2:]])
"""


@NEEDS_RTX
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("phase", [1, 4, 9])
def test_ctrl_c_stops_the_builder_and_leaves_the_bundle(path: Path, phase: int) -> None:
    before = sorted(path.rglob("*"))
    command = [
        sys.executable,
        "-c",
        INTERRUPTED,
        str(phase),
        "--bundle",
        str(path),
        "--plugin",
        "off",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 130, run.stderr
    assert (
        "stopping: TensorRT ends the step that it is in" in run.stderr
        and run.stderr.rstrip().endswith("interrupted")
    )
    assert sorted(path.rglob("*")) == before
