"""A wheel on a board: installed into a fresh environment, generate works without the exporter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_export.model.find import DEMO_CHECKPOINT
from tests.runtime.checkpoints import bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
EXPORTER_ONLY = ("torch", "onnx", "onnx_ir", "matplotlib", "huggingface_hub", "safetensors")
# An installed huggingface_hub (tokenizers asks for it) must not be needed either.
REFUSE = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXPORTER_ONLY!r}:
            raise ModuleNotFoundError(f"{{name}} is not on a board", name=name)
sys.meta_path.insert(0, Refuse())
from ssd_export.cli.main import main
main(sys.argv[1:])
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("ssd_export-*.whl")
    return built


@pytest.fixture(scope="module", params=["tested", "lowest", "newest"])
def board(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The Python of an environment that has the wheel and ONNX Runtime, and nothing else of ours:
    in the versions tested together, in the lower bounds that pyproject.toml declares, and in the
    newest that pip finds.
    """
    if request.param == "lowest" and sys.version_info >= (3, 13):
        pytest.skip("the lower bounds of numpy and pillow have no wheels for Python 3.13 or newer")
    folder = tmp_path_factory.mktemp("board")
    # Neither pip nor compiled files, most of which nobody would import: half of the time.
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    versions = ROOT / "constraints.txt"
    if request.param == "lowest":
        versions = folder / "lowest.txt"
        versions.write_text(run(sys.executable, ROOT / ".ci/lowest_versions.py", "ort", cwd=folder))
    constraints = () if request.param == "newest" else ("-c", versions)
    install = (*PIP, "--python", python, "install", "--no-compile")
    run(*install, *constraints, f"{wheel}[ort]", cwd=folder)
    return python


def test_a_board_installs_nothing_of_the_exporter(board: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", board)
    listed = run(*pip, "list", "--format=freeze", cwd=board.parent)
    installed = {line.split("==")[0].replace("-", "_") for line in listed.splitlines()}
    assert "onnxruntime" in installed
    assert not installed & {*EXPORTER_ONLY} - {"huggingface_hub"}


def test_generate_works_on_a_board(board: Path, tmp_path: Path) -> None:
    command = (
        "generate",
        "a red circle on white",
        "--bundle",
        bundle(DEMO_CHECKPOINT, "ssd-auto", 0.2),
        "--out",
        "out.png",
    )
    said = run(board, "-c", REFUSE, *command, cwd=tmp_path)
    assert "out.png: 1 image" in said and (tmp_path / "out.png").stat().st_size > 0
    assert "decode_step" in run(
        board, "-c", REFUSE, "inspect", bundle(DEMO_CHECKPOINT, "ssd-auto", 0.2), cwd=tmp_path
    )
