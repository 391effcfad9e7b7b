"""Memory that `calibrate` takes: peaks on the first layers of a published shape, and from two of
them on all layers.

    python -m benchmarks.calibration_memory --shape janus-pro-1b --layers 1,3
    python -m benchmarks.calibration_memory --shape janus-pro-7b --layers 1,2

Each number of layers is a random fp16 checkpoint and a separate process, which goes through the
stages of the command with prompts as long as they may be: load the model; generate the first tokens
of as many images as are generated together (the cache has all its slots from the beginning);
measure one image, every option of the menu, one backward pass (`--costs fisher`, the default of
such models). Peaks are resident memory in a stage (Linux). Every call adds its shape to
docs/measurements/calibration_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measured_process import peak_bytes
from ssd_export.model.families import PUBLISHED
from ssd_export.report.measurement import measurement, read_measurement, table, write_measurement

JSON = Path("docs/measurements/calibration_memory.json")
COMMAND = "python -m benchmarks.calibration_memory (its docstring has the calls)"
STAGES = ("load", "generate", "measure")
PROMPT_SLOTS = 64
TOKENS = 3  # generated of each image: more take time and no memory
GB = 1e9


def measure_stages(folder: Path) -> dict[str, Any]:
    """Peak bytes of each stage in this process, and the seconds that measuring an image takes."""
    import torch

    from ssd_export.calibrate.calibration import (
        BATCH,
        FISHER,
        CalibrationSpec,
        add_image,
        rows_of,
    )
    from ssd_export.calibrate.measure import HeadSums
    from ssd_export.calibrate.neighborhood import Neighborhood
    from ssd_export.calibrate.sequences import FullCacheImages
    from ssd_export.model.checkpoint import open_checkpoint
    from ssd_export.model.families import prompt_encoder
    from ssd_export.model.load import load_model
    from ssd_export.noise import ImageSeed
    from ssd_export.policy.menu import menu
    from ssd_export.runtime.loop import single_steps
    from ssd_export.runtime.prompt_batch import PromptBatch
    from ssd_export.sampling import Sampling

    checkpoint, rng = open_checkpoint(folder), np.random.default_rng(0)
    config, sampling, peaks = checkpoint.config, Sampling(5.0, 1.0), {}
    model = load_model(
        checkpoint, dtype=torch.float16
    )  # as all layers are: a few alone would be widened to float32
    peaks["load"] = _peak_of_stage()
    rows = config.rows_per_image * BATCH
    ids = rng.integers(0, config.vocab_size, (rows, PROMPT_SLOTS), np.int32)
    encoder = prompt_encoder(checkpoint.config, checkpoint.file)
    images = FullCacheImages(model, encoder, PROMPT_SLOTS)
    seeds = tuple(ImageSeed(0, image) for image in range(BATCH))
    lengths = np.full(rows, PROMPT_SLOTS, np.int32)
    batch = PromptBatch(images.batches.embed(ids), lengths, seeds, (sampling,) * BATCH)
    images(batch, single_steps(TOKENS))
    peaks["generate"] = _peak_of_stage()
    spec = CalibrationSpec(
        ("random",),
        1,
        Neighborhood.default(config.grid),
        0,
        sampling,
        PROMPT_SLOTS,
        menu(config.grid),
        costs=FISHER,
    )
    tokens = rng.integers(0, config.codebook_size, config.grid.num_tokens, np.int32)
    began = time.perf_counter()
    sums = HeadSums.zero(config, len(spec.options))
    add_image(sums, model, rows_of(batch, 0, sampling), tokens, spec)
    seconds = time.perf_counter() - began
    peaks["measure"] = _peak_of_stage()
    return {"num_layers": config.num_layers, "seconds": seconds, "peaks": peaks}


def _peak_of_stage() -> int:
    """Peak of resident memory since the last call; the next begins with what is resident now."""
    peak = peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def measure_layers(shape: str, num_layers: int, where: Path | None) -> dict[str, Any]:
    """measure_stages in a separate process, on a checkpoint that is gone afterwards."""
    from benchmarks.synthetic_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(dir=where) as folder:
        checkpoint = write_checkpoint(
            Path(folder) / "checkpoint", shape, "transformers", "fp16", num_layers=num_layers
        )
        worker = [
            sys.executable,
            "-m",
            "benchmarks.calibration_memory",
            "--worker",
            str(checkpoint),
        ]
        done = subprocess.run(worker, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(
                f"{shape}, {num_layers} layers: the process ended with {done.returncode}"
            )
        return json.loads(done.stdout)


def of_all_layers(rows: list[dict[str, Any]], num_layers: int) -> dict[str, float]:
    """Peak bytes of each stage: a layer takes what it takes between the least and the greatest
    number measured.
    """
    few, many = min(rows, key=_layers), max(rows, key=_layers)
    each = {
        name: (many["peaks"][name] - few["peaks"][name]) / (_layers(many) - _layers(few))
        for name in STAGES
    }
    return {name: few["peaks"][name] + each[name] * (num_layers - _layers(few)) for name in STAGES}


def _layers(row: dict[str, Any]) -> int:
    return row["num_layers"]


def report(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Results for docs/measurements; measured: by shape, what measure_layers gave."""
    rows, figures = [], {}
    for shape, runs in sorted(measured.items()):
        rows += [
            [
                shape,
                _layers(run),
                *(_gb(run["peaks"][name]) for name in STAGES),
                f"{run['seconds']:.0f}",
            ]
            for run in sorted(runs, key=_layers)
        ]
        num_layers = PUBLISHED[shape].num_layers
        whole = of_all_layers(runs, num_layers)
        rows.append(
            [shape, f"all {num_layers}, computed", *(_gb(whole[name]) for name in STAGES), None]
        )
        figures[f"{shape}-gb"] = _gb(max(whole.values()))
    columns = [
        "shape",
        "layers",
        "load, GB",
        "generate, GB",
        "measure, GB",
        "seconds an image measured",
    ]
    return {"tables": [table("", columns, rows)], "figures": figures, "measured": measured}


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}"


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(PUBLISHED), default="janus-pro-1b")
    parser.add_argument("--layers", default="1,3", help="two numbers or more, with commas between")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written for as long as they are needed"
    )
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--note", default="")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    spec = parser.parse_args()
    if spec.worker:
        print(json.dumps(measure_stages(spec.worker)))
        return
    counts = sorted({int(count) for count in spec.layers.split(",")})
    if len(counts) < 2:
        parser.error(f"--layers {spec.layers} gives no slope; use two numbers or more, such as 1,3")
    already = read_measurement(spec.json)
    measured = already["results"]["measured"] if already else {}
    measured[spec.shape] = [measure_layers(spec.shape, count, spec.folder) for count in counts]
    write_measurement(spec.json, measurement(COMMAND, report(measured), spec.note))
    print(spec.json)


if __name__ == "__main__":
    main()
