"""A file of prompts on two local Ray workers, with a worker and then the driver killed in the
middle, compared image by image with one process.

    python -m benchmarks.ray_prompts BUNDLE [--prompts 200] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.report.measurement import measurement, table, write_measurement

ROOT = Path(__file__).parent.parent
WORKERS = 2
COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "ring")


class Job:
    """`ssd-export generate --prompts` in a separate process."""

    def __init__(self, bundle: Path, prompts: Path, out: Path, batch: int, on_ray: bool) -> None:
        """Starts it."""
        command = [sys.executable, "cli.py", "generate", "--prompts", str(prompts)]
        command += ["--bundle", str(bundle), "--out", str(out), "--batch", str(batch)]
        command += ["--threads", "1", *(["--ray", "--ray-workers", str(WORKERS)] * on_ray)]
        self.out, self._began = out, time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def results(self) -> list[dict[str, Any]]:
        """Results that are written so far."""
        file = self.out / "results.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, images: int) -> None:
        """Returns once so many images are written. Raises: SystemExit where it ends before."""
        while len(self.results()) < images:
            if self.process.poll() is not None:
                raise SystemExit(f"it ended before: {self.process.communicate()[0]}")
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Processes of the Ray workers (Linux)."""
        return [
            child
            for child in descendants(self.process.pid)
            if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"ray::ImageWorker")
        ]

    def finish(self) -> tuple[float, str]:
        """Seconds and the last line. Raises: SystemExit where it fails."""
        output, _ = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(output)
        return time.perf_counter() - self._began, output.splitlines()[-1]


def descendants(process: int) -> Iterator[int]:
    """Process numbers below a process (Linux)."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def differences(job: Job, other: Job, count: int) -> int:
    """Images that are missing, doubled or different."""
    lines = sorted(result["line"] for result in job.results() if result["error"] is None)
    names = [f"{line:06d}-0.png" for line in range(1, count + 1)]
    found = sorted(path.name for path in job.out.glob("*.png"))
    if lines != list(range(1, count + 1)) or found != names:
        return max(1, abs(len(lines) - count))
    pairs = ((job.out / name, other.out / name) for name in names)
    return sum(not np.array_equal(Image.open(one), Image.open(two)) for one, two in pairs)


def measure(bundle: Path, count: int, batch: int, folder: Path) -> dict[str, Any]:
    """The results of a measurement."""
    prompts = folder / "prompts.txt"
    every = [f"a {color} {shape} on white" for color in COLORS for shape in SHAPES]
    prompts.write_text("\n".join(every[number % len(every)] for number in range(count)))

    def job(name: str, on_ray: bool = True) -> Job:
        return Job(bundle, prompts, folder / name, batch, on_ray)

    here = job("here", on_ray=False)
    seconds, said = here.finish()
    rows: list[list[Any]] = [["one process", count, None, 0, f"{seconds:.0f}"]]

    killed = job("worker-killed")
    killed.wait_for(count // 3)
    os.kill(killed.workers()[0], signal.SIGKILL)
    seconds, said = killed.finish()
    wrong = differences(killed, here, count)
    rows.append(["two workers, one killed in the middle", count, None, wrong, f"{seconds:.0f}"])

    stopped = job("driver-killed")
    stopped.wait_for(count // 3)
    stopped.process.kill()
    stopped.process.communicate()
    there = len(stopped.results())
    resumed = job("driver-killed")
    seconds, said = resumed.finish()
    assert f"{count - there} images made, {there} were there" in said, said
    wrong_resumed = differences(resumed, here, count)
    what = "the driver killed, then the same command"
    rows.append([what, count - there, there, wrong_resumed, f"{seconds:.0f}"])
    columns = ["run", "images made", "were there", "missing, doubled or different", "seconds"]
    note = f"{count} prompts in batches of {batch}, one thread a worker; startup is in the seconds."
    figures = {"prompts": count, "wrong": wrong + wrong_resumed}
    return {"tables": [table("On a Ray cluster", columns, rows, note)], "figures": figures}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/ray_prompts.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.bundle.resolve(), asked.prompts, asked.batch, Path(folder))
    command = f"python -m benchmarks.ray_prompts BUNDLE --prompts {asked.prompts}"
    write_measurement(asked.out, measurement(command, found, asked.note))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
