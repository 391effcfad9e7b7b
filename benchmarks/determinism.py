"""Finds the images whose tokens stay the same when something beside prompt and seed changes.

    python -m benchmarks.determinism [--images 64] [--out FILE.json]

The demo model in ONNX Runtime, one thread, images one at a time, is what all else is compared with:
another process, larger batches, more threads, the torch runner, other precisions. Of an image whose
tokens differ, the first place where they do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.cli.main import main as command_line
from ssd_export.errors import UserError
from ssd_export.metrics.scene_score import draw_scenes
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator

BUDGET = 0.2
FP32, ROUNDING = (), "sums in another order"


@dataclass(frozen=True)
class Change:
    """A change to try. export: options of its bundle; cause: why tokens may differ."""

    name: str
    cause: str
    batch: int = 1
    threads: int = 1
    runner: str = "ort"
    export: tuple[str, ...] = FP32
    other_process: bool = False


CHANGES = (
    Change("another process", "none: the same instructions", other_process=True),
    Change("batches of 8", ROUNDING, batch=8),
    Change("batches of 32", ROUNDING, batch=32),
    Change("2 threads", ROUNDING, threads=2),
    Change("runner torch", ROUNDING, batch=16, runner="torch"),
    Change("fp16", "weights and caches rounded", batch=16, export=("--dtype", "fp16")),
    Change("int8 weights", "weights rounded", batch=16, export=("--weights", "int8")),
    Change("int4 weights", "weights rounded", batch=16, export=("--weights", "int4")),
    Change("int8 caches", "caches rounded", batch=16, export=("--kv-dtype", "int8")),
)


def export(folder: Path, options: tuple[str, ...]) -> Path:
    """The demo's bundle with these options. Raises: UserError where it cannot be made."""
    out = folder / ("-".join(options).replace("--", "") or "fp32")
    if not out.exists():
        try:
            command_line(["export", "--budget", str(BUDGET), "--out", str(out), *options])
        except SystemExit as ended:
            if ended.code:
                raise UserError(f"the export with {' '.join(options)} failed") from None
    return out


def tokens(path: Path, num_images: int, change: Change) -> np.ndarray:
    """int32 [num_images, image tokens] of captions that training never saw."""
    captions = [scene.caption for scene in draw_scenes(num_images, 0)]
    with ImageGenerator.from_bundle(path, change.runner, num_threads=change.threads) as generator:
        return generator(captions, seed=0, max_batch=change.batch).tokens


def tokens_elsewhere(path: Path, num_images: int) -> np.ndarray:
    """The same from a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.npy"
        code = (
            "import sys, pathlib, numpy; from benchmarks.determinism import *\n"
            "numpy.save(sys.argv[2], tokens(pathlib.Path(sys.argv[1]), int(sys.argv[3]),"
            " Change('', '')))"
        )
        command = [sys.executable, "-c", code, str(path), str(file), str(num_images)]
        subprocess.run(command, check=True)
        return np.load(file)


def compared(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """The share of images without a different token, of equal tokens, and the median place of the
    first that differs.
    """
    different = found != wanted
    images = different.any(axis=1)
    first = different[images].argmax(axis=1)
    return {
        "images": float(1 - images.mean()),
        "tokens": float(1 - different.mean()),
        "first": None if not images.any() else float(np.median(first)),
    }


def results_of(rows: list[dict[str, Any]], num_images: int) -> dict[str, Any]:
    """Table and figures for the documents."""
    cells = [
        [
            row["name"],
            f"{100 * row['images']:.1f} %",
            f"{100 * row['tokens']:.1f} %",
            "-" if row["first"] is None else f"{row['first']:.0f}",
            "-" if row["images"] == 1 else row["cause"],
        ]
        for row in rows
    ]
    note = (
        f"{num_images} captions, demo model, ssd-auto at {BUDGET}, against ONNX Runtime in float32,"
        " one thread, images one at a time. First: the median token at which an image that differs"
        " does so first; after it, its tokens are another image's."
    )
    columns = ["changed", "images with the same tokens", "equal tokens", "first", "cause"]
    return {
        "rows": rows,
        "tables": [table("Same prompt, same seed", columns, cells, note)],
        "figures": {row["name"].replace(" ", "-"): f"{100 * row['images']:.1f} %" for row in rows},
    }


def main() -> int:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(description="Compares tokens when something else changes.")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a measurement for the documents")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ssd-export-determinism-") as place:
        folder = Path(place)
        try:
            reference = export(folder, FP32)
            wanted = tokens(reference, asked.images, Change("", ""))
            for change in CHANGES:
                path = export(folder, change.export)
                found = (
                    tokens_elsewhere(path, asked.images)
                    if change.other_process
                    else tokens(path, asked.images, change)
                )
                rows.append(vars(change) | compared(found, wanted))
                print(f"{change.name}: {100 * rows[-1]['images']:.1f} % of the images", flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if asked.out:
        command = f"python -m benchmarks.determinism --images {asked.images}"
        write_measurement(asked.out, measurement(command, results_of(rows, asked.images)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
