"""The C++ plugin configures with clear messages, compiles, and builds engines with TensorRT-RTX on
the CPU.

Compiling needs cmake, a C++ compiler, the CUDA headers and TensorRT's headers (TENSORRT_ROOT or
installed); building engines needs `pip install ssd-export[rtx]` too. What is missing is printed by
the skip. No engine is run here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ssd_export.export.plugin_flavor import KINDS

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None, reason="needs cmake and a C++ compiler"
)
HEADERS_HERE = "TensorRT's headers are installed here"


def configure(
    folder: Path, *options: str, source: Path = PLUGINS
) -> subprocess.CompletedProcess[str]:
    """cmake's run; its one-line message is stderr without line breaks."""
    command = ["cmake", "-S", str(source), "-B", str(folder), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return subprocess.CompletedProcess(
        command, run.returncode, run.stdout, " ".join(run.stderr.split())
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    configured = configure(folder)
    if configured.returncode:
        pytest.skip(re.sub(r".*\(message\): | Call Stack.*", "", configured.stderr))
    built = subprocess.run(
        ["cmake", "--build", str(folder), "--parallel", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    return folder / "libssd_export_plugin.so"


def test_the_library_needs_neither_tensorrt_nor_cuda_nor_a_cxx_runtime(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    read = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert not re.findall(r"NEEDED.*(nvinfer|cuda|tensorrt|stdc\+\+)", read)
    exported = subprocess.run(
        ["readelf", "-W", "--dyn-syms", str(library)], capture_output=True, text=True, check=True
    )
    names = {
        line.split()[-1]
        for line in exported.stdout.splitlines()
        if " GLOBAL DEFAULT" in line and " UND " not in line
    }
    assert names >= {"getCreators", "setLoggerFinder"}


def test_missing_headers_are_named_with_the_fix(tmp_path: Path) -> None:
    configured = configure(tmp_path, "-DTENSORRT_ROOT=/nowhere")
    if configured.returncode == 0:
        pytest.skip(HEADERS_HERE)
    assert "NvInferRuntime.h is missing" in configured.stderr
    assert (
        "-DTENSORRT_ROOT=DIR" in configured.stderr
        and "-DSSD_FETCH_TENSORRT_HEADERS=ON" in configured.stderr
    )


def test_headers_before_10_3_are_refused(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 8 //!<\n#define NV_TENSORRT_MINOR 6 //!<\n"
    )
    configured = configure(tmp_path / "build", f"-DTENSORRT_INCLUDE_DIR={tmp_path}")
    assert (
        configured.returncode
        and "is TensorRT 8.6" in configured.stderr
        and "need 10.3" in configured.stderr
    )


@pytest.mark.parametrize("kind", ["absent", "changed"])
def test_a_download_is_checked(tmp_path: Path, kind: str) -> None:
    if kind == "changed":
        (tmp_path / "NvInferImpl.h").write_text("not NVIDIA's")
    configured = configure(
        tmp_path / "build",
        "-DSSD_FETCH_TENSORRT_HEADERS=ON",
        f"-DSSD_TENSORRT_HEADERS_URL=file://{tmp_path}",
        "-DTENSORRT_INCLUDE_DIR=TENSORRT_INCLUDE_DIR-NOTFOUND",
        "-DTENSORRT_ROOT=/nowhere",
    )
    if configured.returncode == 0:
        pytest.skip(HEADERS_HERE)
    wanted = {"absent": "cannot download", "changed": "is not the file of TensorRT 10.3.0"}[kind]
    assert wanted in configured.stderr and "-DTENSORRT_ROOT=DIR" in configured.stderr


@pytest.fixture(scope="module")
def built(
    library: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict], dict[str, str]]:
    """Results by name, and what was printed on stderr in each run."""
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT-RTX: pip install ssd-export[rtx]")
    import tensorrt_rtx_libs

    links = tmp_path_factory.mktemp("links")
    shared = next(Path(tensorrt_rtx_libs.__path__[0]).glob("libtensorrt_rtx.so.*"))
    (links / "libtensorrt_rtx.so").symlink_to(shared)
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{links}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    }
    command = [sys.executable, "-m", "tests.plugins.rtx_build", str(library)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results = {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}
    said = dict(re.findall(r"^== (.*?)\n(.*?)(?=^== |\Z)", run.stderr, re.DOTALL | re.MULTILINE))
    return results, said


def test_the_creators_have_the_nodes_names(built: tuple) -> None:
    wanted = [[kind.op_type, "ssd_export", kind.version] for kind in KINDS]
    assert sorted(built[0]["registry"]["creators"]) == wanted


def test_every_node_becomes_one_plugin_layer(built: tuple) -> None:
    """Of two head groups, of three (14 inputs, 12 outputs) and of one."""
    result = built[0]["both"]
    assert result["network"] == ["LayerType.PLUGIN_V3"] * 3
    assert result["layers"] == ["PluginV3"] * 3, "no copies of caches, no reformats"
    assert result["engine_bytes"] and result["holds_library"]


def test_a_window_of_a_layer_becomes_two_plugin_layers(built: tuple) -> None:
    """Of three head groups: 16 and 18 inputs, 16 and 12 outputs; the second takes over the caches
    that the first has in place.
    """
    result = built[0]["windows"]
    assert result["network"] == ["LayerType.PLUGIN_V3"] * 6
    assert result["layers"].count("PluginV3") == 6
    assert {*result["layers"]} <= {"PluginV3", "NoOp"}, "no copies of caches, no reformats"
    assert result["engine_bytes"] and result["holds_library"]


REJECTED = {
    "no kernel": r"field kernel_\w+ is missing; attach a compiled kernel",
    "not an image": "kernel_part_image is neither a cubin nor a fatbin nor PTX",
    "unknown dtype": "kernel_dtype=int8 is unknown; use float16, bfloat16 or float32",
    "too much shared memory": r"kernel_sum_shared_bytes=50000 is outside 0\.\.49152",
    "evict_every": r"evict_every=0 is outside 1\.\.",
    "evicts more than all": "evict_every=181 evicts more than the 180 slots there are",
    "score_decay": r"score_decay=1\.5\d* is outside",
    "pinned_columns": "pinned_columns=16777216 pins columns that a grid of width 24 does not have",
    "score missing": r"6 inputs where 7 were expected \(past_score goes with by_score=1\)",
    "too many slots": "past_key of group 0 has 1025 slots; the kernel holds 1 to 1024",
    "head_dim": (
        "the kernel is for head_dim 128, the model has 64; compile the kernels with --head-dims 64"
    ),
    "query heads": (
        r"heads has shape \[-1 x 7 x 64\]: no whole number of query heads for each of 2 KV heads"
    ),
    "heads shape": r"heads has shape \[-1 x 8 x 32\] where \[-1 x 8 x 64\] was expected",
    "no places": r"heads has shape \[-1 x 8 x 64\]: no whole number of query heads for each of 2",
    "groups differ": "field num_recent has 2 numbers for 1 head groups; export the bundle again",
    "four groups": "field num_sinks must be 1 to 3 integers, one for each head group",
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_does_not_fit_is_refused_with_a_message(built: tuple, name: str) -> None:
    results, said = built
    assert results[name]["engine_bytes"] == 0
    assert re.search(REJECTED[name], said[name]), said[name]
