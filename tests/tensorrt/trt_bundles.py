"""Bundles with doubles of engines, and runners over the doubles of CUDA and TensorRT."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssd_export.bundle import Bundle
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.tensorrt import engine_files
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.engine_files import find_engines
from ssd_export.tensorrt.runner import TrtRunner
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file
from tests.tensorrt.cuda_double import CudaDouble
from tests.tensorrt.engine_doubles import write_engines
from tests.tensorrt.trt_double import CAPABILITY, TrtDouble

TINY = TinyJanus(seed=3, num_kv_heads=2)


@dataclass
class Doubles:
    """A bundle with engines and what stands for the GPU and TensorRT."""

    path: Path
    bundle: Bundle
    cuda: CudaDouble
    trt: TrtDouble

    def runner(self) -> TrtRunner:
        return TrtRunner(self.bundle, find_engines(self.bundle, CAPABILITY), CudaDevice(self.cuda))

    def generator(self) -> ImageGenerator:
        return ImageGenerator(self.bundle, self.runner())


def copied_bundle(folder: Path, policy: str = "ssd-row", **changes: Any) -> Path:
    model = checkpoint(TINY)
    whole = bundle(
        model,
        policy,
        1.0 if policy == "full" else 0.2,
        head_map=str(head_map_file(model)),
        **changes,
    )
    return shutil.copytree(whole, folder / "bundle")


def doubles(
    monkeypatch: pytest.MonkeyPatch, path: Path, is_rtx: bool = True, **engines: Any
) -> Doubles:
    """Doubles of the bundle's engines, found by whoever looks for TensorRT until the test ends."""
    write_engines(path, flavor="tensorrt-rtx" if is_rtx else "tensorrt", **engines)
    return found_doubles(monkeypatch, path, is_rtx)


def found_doubles(monkeypatch: pytest.MonkeyPatch, path: Path, is_rtx: bool = True) -> Doubles:
    """The same for engines that are in the bundle already."""
    cuda = CudaDouble()
    trt = TrtDouble(cuda, path, is_rtx)
    monkeypatch.setattr(engine_files, "is_installed", lambda name: name == trt.flavor.name)
    monkeypatch.setattr(engine_files, "load_flavor", lambda name: trt.flavor)
    return Doubles(path, trt.bundle, cuda, trt)
