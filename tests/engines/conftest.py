"""The library, built once a run, and bundles of the demo model for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssd_export.demo.codes import encode_scene
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.export.temporary_bundle import PolicyChoice
from ssd_export.metrics.scene_score import draw_scenes
from tests.engines.builds import Builds
from tests.engines.trt_builds import TrtBuild, trt_build
from tests.made_once import made_once, run_folder

CHOICES = {
    "ssd-auto": PolicyChoice(),
    "ssd-auto-0.1": PolicyChoice(budget=0.1),
    "full": PolicyChoice(policy="full", budget=1.0),
    "h2o": PolicyChoice(policy="h2o"),
    "streaming-llm": PolicyChoice(policy="streaming-llm"),
    "linear": PolicyChoice(policy="linear"),
    "ssd": PolicyChoice(policy="ssd"),
    "int4": PolicyChoice(weights="int4"),
    "int8": PolicyChoice(weights="int8"),
    "kv-int8": PolicyChoice(kv_dtype="int8"),
    "fp16": PolicyChoice(dtype="fp16"),
    "long-prompts": PolicyChoice(prompt_slots=400),
}


INT8_DECODER = "int8-decoder"
NUM_SAMPLES = 28  # images that the int8 image decoder is calibrated on


def export(name: str, out: Path) -> None:
    """Exports the bundle of a name of CHOICES, or the demo model with an int8 image decoder."""
    if name != INT8_DECODER:
        export_bundle(CHOICES[name].export_spec(out))
        return
    samples = out.parent / "samples.npy"
    np.save(samples, np.stack([encode_scene(scene) for scene in draw_scenes(NUM_SAMPLES, 3)]))
    export_bundle(ExportSpec(out=out, decoder_weights="int8", decoder_samples=samples))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    kept = os.environ.get("SSD_ENGINES_BUILD")
    folder = Path(kept) if kept else run_folder(tmp_path_factory) / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return Builds(folder, kept is not None)


@pytest.fixture(scope="session")
def trt(build: Builds) -> TrtBuild:
    return trt_build(build)


@pytest.fixture(scope="session")
def bundles(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a name that `export` knows, exported once a run; not to be changed."""
    folder = run_folder(tmp_path_factory) / "engine-bundles"

    def bundle(name: str) -> Path:
        return made_once(folder / name, lambda made: export(name, made / "b")) / "b"

    return bundle
