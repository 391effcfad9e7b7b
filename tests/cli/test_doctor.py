"""The verb doctor: what it tries is real, and its exit code says what works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssd_export.tensorrt.target import gpu_here

Run = Callable[..., SimpleNamespace]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_this_machine_as_json(run: Run) -> None:
    done = run("doctor", "--json", "--for", "export, ort,torch")
    assert done.code == 0, done.out
    found = json.loads(done.out)
    abilities = {one["name"]: one for one in found["abilities"]}
    assert all(abilities[name]["works"] for name in ("export", "ort", "torch"))
    assert abilities["trt"]["works"] or abilities["trt"]["problem"]
    findings = {one["name"]: one for one in found["findings"]}
    assert findings["CPUExecutionProvider"]["state"] == "ok"
    assert "free of" in findings["memory"]["says"] and sys.executable in findings["Python"]["says"]


@pytest.mark.slow
@pytest.mark.skipif(gpu_here() is not None, reason="needs a machine without a GPU")
def test_without_a_gpu_the_trt_runner_is_what_fails(run: Run) -> None:
    done = run("doctor", "--for", "trt")
    assert done.code == 32 + 16
    assert "\ntrt: cannot work here: no NVIDIA GPU" in done.out and "\nort: works (on" in done.out


def test_an_unknown_name_is_refused_before_anything_is_tried(run: Run) -> None:
    done = run("doctor", "--for", "onnx")
    assert done.code == 1 and "choose from export,build-engine,ort,torch,trt" in done.err


@pytest.mark.slow
def test_with_nothing_but_click_it_says_what_is_missing(tmp_path: Path) -> None:
    """Where every other verb can only end, this one still speaks."""
    for name in ("msgspec", "numpy", "onnxruntime", "torch", "onnx_ir", "tensorrt_rtx", "PIL"):
        (tmp_path / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        )
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "doctor"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.returncode == 32 + 1 + 2 + 4 + 8 + 16, done.stdout
    assert "onnxruntime is not installed for" in done.stdout
    assert 'pip install "ssd-export[export]"' in done.stdout
