"""A file of prompts on a Ray cluster of two local workers: the images of one process, each once,
whoever is killed meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_export.prompt_files.on_ray import MAX_LOSSES, _Batch
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

pytest.importorskip("ray", reason="needs the extra [ray]: pip install ssd-export[ray]")

ROOT = Path(__file__).parents[2]
IMAGES, BATCH = 16, 2
WAIT = 900.0  # seconds: a bound for what hangs, on the busiest machine


@pytest.fixture
def path() -> Path:
    return bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)


def start(path: Path, folder: Path, out: str, *options: str) -> subprocess.Popen[str]:
    prompts = folder / "p.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(IMAGES)))
    command = [sys.executable, str(ROOT / "cli.py"), "generate", "--prompts", str(prompts)]
    command += ["--bundle", str(path), "--out", str(folder / out), "--batch", str(BATCH)]
    return subprocess.Popen(
        [*command, "--threads", "1", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def on_ray(path: Path, folder: Path) -> subprocess.Popen[str]:
    return start(path, folder, "ray", "--ray", "--ray-workers", "2")


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output
    return output


def descendants(process: int) -> Iterator[int]:
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def workers_of(process: int) -> list[int]:
    """Those of our actors."""
    return [
        child
        for child in descendants(process)
        if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"ray::ImageWorker")
    ]


def results(folder: Path) -> list[dict[str, object]]:
    file = folder / "results.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_images(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + WAIT
    while len(results(folder)) < count:
        assert process.poll() is None and time.monotonic() < ends, "it ended before"
        time.sleep(0.02)


def check_equal(folder: Path, expected: Path) -> None:
    """Every image once, and the same pixels."""
    lines = [result["line"] for result in results(folder)]
    assert sorted(lines) == list(range(1, IMAGES + 1))
    names = sorted(path.name for path in expected.glob("*.png"))
    assert sorted(path.name for path in folder.glob("*.png")) == names and len(names) == IMAGES
    for name in names:
        assert (
            np.asarray(Image.open(folder / name)) == np.asarray(Image.open(expected / name))
        ).all()


def test_a_batch_is_tried_again_and_then_in_halves() -> None:
    batch, tries = _Batch(tuple(range(3))), 0
    while (again := batch.again()) == [_Batch(batch.tasks, batch.losses + 1)]:
        batch, tries = again[0], tries + 1
    assert tries == MAX_LOSSES - 1
    assert again == [_Batch((0, 1)), _Batch((2,))]
    assert _Batch((0,), MAX_LOSSES - 1).again() == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_worker_and_a_killed_driver_lose_and_double_nothing(
    path: Path, tmp_path: Path
) -> None:
    """The driver first; of the run that goes on a worker, before it has made all that is left."""
    finished(start(path, tmp_path, "here"))
    process = on_ray(path, tmp_path)
    wait_for_images(tmp_path / "ray", BATCH, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    made = len(results(tmp_path / "ray"))
    assert 0 < made < IMAGES - 2 * BATCH, "killed in the middle"

    process = on_ray(path, tmp_path)
    wait_for_images(tmp_path / "ray", made + BATCH, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    assert f"{IMAGES - made} images made, {made} were there, 0 failed" in finished(process)
    check_equal(tmp_path / "ray", tmp_path / "here")


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(path: Path, tmp_path: Path) -> None:
    process = start(path, tmp_path, "none", "--ray", "127.0.0.1:1")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 1 and "no Ray cluster at 127.0.0.1:1" in output
    assert "Traceback" not in output
