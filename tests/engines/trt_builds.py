"""The C++ library with the backends tensorrt and tensorrt-rtx, doubles of TensorRT and of the CUDA
driver beside it, and bundles whose engines the doubles run.

TENSORRT_ROOT is a folder of TensorRT's headers (10.3 or newer), TENSORRT_RTX_ROOT one of RTX's SDK;
without the latter RTX's names are added to headers of 10.13 or newer (doubles/rtx_headers.py).
TENSORRT_HEADERS lists more folders (separated by colons) that the library is compiled against.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.tensorrt.kv_update import kv_update_graph
from tests.engines.builds import ROOT, Builds, onnxruntime_library, run
from tests.engines.cases import Made, run_cases
from tests.made_once import held, made_once
from tests.tensorrt.engine_doubles import write_engines
from tests.tensorrt.trt_double import VERSION, WITH_KV_UPDATE

DOUBLES = ROOT / "tests" / "engines" / "doubles"
HEADER = "NvInferRuntime.h"
NEEDS = f"needs TensorRT's headers: TENSORRT_ROOT=DIR with {HEADER} of 10.3 or newer"
NEEDS_RTX = (
    "needs the headers of TensorRT-RTX (TENSORRT_RTX_ROOT=DIR), or those of TensorRT 10.13 or newer"
    " (TENSORRT_ROOT, TENSORRT_HEADERS)"
)
FIRST_WITH_RUNTIME_CONFIG = (10, 13)


def include_folders() -> list[Path]:
    """The folders of headers that the environment names."""
    roots = [
        os.environ.get("TENSORRT_ROOT", ""),
        *os.environ.get("TENSORRT_HEADERS", "").split(":"),
    ]
    places = [Path(root) / part for root in roots if root for part in ("include", ".")]
    return list(dict.fromkeys(place.resolve() for place in places if (place / HEADER).is_file()))


def header_version(include: Path) -> tuple[int, ...]:
    """Major, minor, patch and build number of a folder of headers."""
    text = (include / "NvInferVersion.h").read_text()
    found = [
        re.search(rf"define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE|_RTX)? +(\d+)", text)
        for part in ("MAJOR", "MINOR", "PATCH", "BUILD")
    ]
    return tuple(int(match[1]) for match in found if match)


def rtx_headers(folder: Path) -> Path:
    """RTX's headers, or what stands in for them; skips where neither is had."""
    if "TENSORRT_RTX_ROOT" in os.environ:
        return Path(os.environ["TENSORRT_RTX_ROOT"])
    newest = max(include_folders(), key=header_version, default=None)
    if newest is None or header_version(newest) < FIRST_WITH_RUNTIME_CONFIG:
        pytest.skip(NEEDS_RTX)

    def make(target: Path) -> None:
        made = run([sys.executable, DOUBLES / "rtx_headers.py", newest, target / "include"])
        assert made.returncode == 0, made.stderr

    return made_once(folder / "rtx_headers", make)


@dataclass(frozen=True)
class TrtBuild:
    """library: the build folder of ssd_runtime; doubles: of the shared libraries that stand in;
    version: what the double of TensorRT says it is.
    """

    library: Path
    doubles: Path
    version: str

    @property
    def environment(self) -> dict[str, str]:
        """What finds the doubles in place of the driver and of TensorRT."""
        return {"LD_LIBRARY_PATH": f"{self.doubles}:{onnxruntime_folder(self.doubles)}"}

    def version_of(self, flavor: str) -> str:
        """The version of a flavor's double."""
        return VERSION if flavor == "tensorrt-rtx" else self.version

    def run(
        self, bundle: Path, cases: list[dict[str, Any]], folder: Path, **environment: str
    ) -> list[Made]:
        """What the library makes of cases on the doubles; what they were told is in
        `folder`/calls.
        """
        asked = [{"bundle": str(bundle), **case} for case in cases]
        environment = {
            **self.environment,
            "SSD_FAKE_BUNDLE": str(bundle),
            "SSD_FAKE_LOG": str(folder / "calls"),
            **environment,
        }
        return run_cases(self.library, asked, folder, **environment)


def onnxruntime_folder(build: Path) -> Path:
    """Where a build's libonnxruntime.so.1 is."""
    library = onnxruntime_library()
    assert library is not None
    beside = library.parent / "libonnxruntime.so.1"
    return library.parent if beside.exists() else build / "onnxruntime" / "lib"


def trt_build(build: Builds, name: str = "tensorrt", *options: str) -> TrtBuild:
    """A library with both flavors and no ONNX Runtime, and the doubles."""
    folders = include_folders()
    if not folders:
        pytest.skip(NEEDS)
    rtx = rtx_headers(build.folder)
    library = build(
        name,
        "-DSSD_RUNTIME_BACKENDS=tensorrt;tensorrt-rtx",
        f"-DTENSORRT_INCLUDE_DIR={folders[0]}",
        f"-DTENSORRT_RTX_ROOT={rtx}",
        "-DCMAKE_BUILD_TYPE=Debug",
        *options,
    )
    version = ".".join(map(str, header_version(folders[0])))
    return TrtBuild(library, doubles(build, folders[0], rtx), version)


@cache
def doubles(build: Builds, include: Path, rtx: Path) -> Path:
    """The folder of the doubles."""
    folder = build.folder / "doubles"
    with held(build.folder / "doubles.lock"):  # what is there already is not compiled again
        _build_doubles(build, folder, include, rtx)
    return folder


def _build_doubles(build: Builds, folder: Path, include: Path, rtx: Path) -> None:
    configured = run(
        ["cmake", "-S", DOUBLES, "-B", folder, *build.options("-DCMAKE_BUILD_TYPE=Release")]
        + [f"-DSSD_DOUBLE_TENSORRT={include}", f"-DSSD_DOUBLE_RTX={rtx / 'include'}"]
    )
    assert configured.returncode == 0, configured.stderr
    built = run(["cmake", "--build", folder])
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]


def add_engines(path: Path, build: TrtBuild, flavor: str, **engines: Any) -> Bundle:
    """Adds engines for the doubles, and the graphs that stand for those with KV-cache updates."""
    bundle = write_engines(path, flavor=flavor, version=build.version_of(flavor), **engines)
    for graph in ("decode_step", "decode_step_top_k", "prefill", "prefill_top_k"):
        updated = path / "onnx" / f"{graph}.kv_update.onnx"
        if bundle.config.policy.kv_dtype == "model":
            updated.write_bytes(kv_update_graph(bundle, graph, WITH_KV_UPDATE))
    return open_bundle(path)
