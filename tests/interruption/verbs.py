"""The writing verbs on a small model: the command, what it leaves, what a whole result is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.policy.head_map import HeadMap
from ssd_export.tensorrt.engine_manifest import read_engines

SWEEP_ROWS, SWEEP_PARTS = 3, 5  # full cache and two policies, those with images and loss
BUNDLE = "bundle"  # in the folder of a verb


@dataclass(frozen=True)
class WritingVerb:
    """arguments: for the inputs' folder and the place of the result. digest: of the result, None
    where it is absent; raises where it is there and broken. kept: patterns of what an interrupted
    run may leave to go on from.
    """

    name: str
    arguments: Callable[[Path, Path], list[object]]
    digest: Callable[[Path], str | None]
    kept: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], None] = lambda inputs, folder: None


def write_inputs(folder: Path) -> None:
    """A checkpoint of one layer a bundle of it, prompts. Imports torch."""
    import torch

    from ssd_export.export.exporter import export_bundle
    from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint
    from tests.runtime.checkpoints import export_spec

    torch.set_num_threads(1)
    model = write_transformers_checkpoint(folder / "model", TinyJanus(num_layers=1))
    export_bundle(export_spec(model, "h2o", 0.1, out=folder / BUNDLE))
    (folder / "prompts.txt").write_text("a red circle\nblue\n")


def bundle_digest(folder: Path) -> str | None:
    return open_bundle(folder / "out").hash if (folder / "out").exists() else None


def head_map_digest(folder: Path) -> str | None:
    path = folder / "head_map.json"
    if not path.exists():
        return None
    HeadMap.load(path)
    return sha256(path.read_bytes())


def sweep_digest(folder: Path) -> str | None:
    """Of the tokens of every cell, as times differ between two runs; None before all are there: an
    interrupted sweep writes the table of those that are.
    """
    parts = sorted((folder / "out" / "cells").glob("*.json"))
    for part in parts:
        json.loads(part.read_text())  # a part is whole or absent
    report = folder / "out" / "sweep.json"
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    if len(rows) < SWEEP_ROWS or len(parts) < SWEEP_PARTS:
        return None
    tokens = sorted((folder / "out" / "cells").glob("*.npz"))
    content = b"".join(array.tobytes() for path in tokens for array in np.load(path).values())
    return sha256(repr([part.name for part in parts]).encode() + content)


def engines_digest(folder: Path) -> str | None:
    """Of what the engines were built from: a builder may choose other kernels each time."""
    engines = read_engines(open_bundle(folder / BUNDLE))
    if not engines:
        return None
    built = {
        place: {name: entry.onnx_sha256 for name, entry in manifest.graphs.items()}
        for place, manifest in engines.items()
    }
    return sha256(json.dumps(built, sort_keys=True).encode())


def training_digest(folder: Path) -> str | None:
    weights = folder / "out" / "checkpoint" / "model.safetensors"
    return sha256(weights.read_bytes()) if weights.exists() else None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def copy_bundle(inputs: Path, folder: Path) -> None:
    shutil.copytree(inputs / BUNDLE, folder / BUNDLE)


def export_arguments(inputs: Path, folder: Path) -> list[Any]:
    return [
        "export",
        *("--model", inputs / "model", "--policy", "h2o", "--budget", 0.2),
        *("--weights", "int4", "--dtype", "fp16", "--out", folder / "out"),
    ]


def calibrate_arguments(inputs: Path, folder: Path) -> list[Any]:
    return [
        "calibrate",
        *("--model", inputs / "model", "--num-images", 2, "--prompts", inputs / "prompts.txt"),
        *("--threads", 1, "--costs", "fisher", "--out", folder / "head_map.json"),
    ]


def sweep_arguments(inputs: Path, folder: Path) -> list[Any]:
    return [
        "sweep",
        *("--model", inputs / "model", "--policies", "h2o,streaming-llm", "--budgets", 0.2),
        *("--num-prompts", 2, "--seeds", 1, "--num-scenes", 1, "--jobs", 1, "--batch", 2),
        *("--threads", 1, "--out", folder / "out"),
    ]


def build_arguments(inputs: Path, folder: Path) -> list[Any]:
    return ["build-engine", "--bundle", folder / BUNDLE, "--target", "ampere", "--plugin", "off"]


def train_arguments(inputs: Path, folder: Path) -> list[Any]:
    return [
        "train-demo",
        *("--steps", 3, "--decoder-steps", 3, "--threads", 1, "--out", folder / "out"),
    ]


VERBS = {
    verb.name: verb
    for verb in (
        WritingVerb(
            "export", export_arguments, bundle_digest, ("out.partial-export",), ("--resume",)
        ),
        WritingVerb("calibrate", calibrate_arguments, head_map_digest, ("head_map.json.partial",)),
        WritingVerb("sweep", sweep_arguments, sweep_digest, ("out",)),
        WritingVerb("build-engine", build_arguments, engines_digest, prepare=copy_bundle),
        WritingVerb("train-demo", train_arguments, training_digest, ("out",)),
    )
}
