"""The plan against runs: what it says of host memory, disk and cache is within a tenth of what happens.

Small checkpoints are exported and drawn from here; real ones were measured once (docs/measurements/real_size.json).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.evaluate.real_size import JSON, run_measured
from ssd_export.evaluate.synthetic_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = [
    ("demo", ["--dtype", "fp32"]),
    ("small", ["--dtype", "fp32", "--policy", "h2o"]),
    ("small", ["--dtype", "fp16", "--policy", "full"]),
    ("small", ["--dtype", "fp32", "--policy", "h2o", "--weights", "int8"]),
    ("small", ["--dtype", "fp16", "--policy", "streaming-llm", "--weights", "int4", "--budget", "0.1"]),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", "small", "original", "fp16")


def planned(model: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "plan", "--json", "--model", model, *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True).stdout)


def of_folder(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("model, options", CONFIGURATIONS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_small_configurations(
    small: Path, model: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    name, bundle = (str(small) if model == "small" else model), tmp_path / "b"
    plan = planned(name, options)
    exported = run_measured(["export", "--model", name, "--out", str(bundle), *options])
    assert plan["host"]["export"] == pytest.approx(exported["peak_bytes"], rel=0.1)
    assert plan["disk"]["bundle"] == pytest.approx(of_folder(bundle), rel=0.1)
    command = ["-m", "ssd_export.evaluate.real_size", "--json", str(tmp_path / "m.json"), "draw", str(bundle),
               "--label", "x", "--tokens", "8", "--decode", "--threads", "1"]  # fmt: skip
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((tmp_path / "m.json").read_text())["results"]["drawings"]["x"]
    assert plan["cache"] == figures["cache_bytes"]
    assert plan["host"]["drawing"] == pytest.approx(figures["peak_bytes"], rel=0.1)
    assert open_bundle(bundle)


def measured() -> list[tuple[str, dict[str, Any]]]:
    path = ROOT / JSON
    if not path.exists():
        return []
    return list(json.loads(path.read_text(encoding="utf-8"))["results"].get("exports", {}).items())


@pytest.mark.parametrize("label, figures", measured(), ids=[label for label, _ in measured()])
def test_real_sizes(label: str, figures: dict[str, Any]) -> None:
    """The checkpoint as it was stored then: in fp16, of a published shape."""
    plan = planned(f"janus-pro-{label.split()[0].lower()}", figures["options"].replace("--force", "").split())
    assert plan["host"]["export"] == pytest.approx(figures["peak_bytes"], rel=0.1)
    assert plan["disk"]["bundle"] == pytest.approx(figures["bundle_bytes"], rel=0.1)
