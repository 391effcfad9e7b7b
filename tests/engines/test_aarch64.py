"""The library for 64-bit Arm: cross-compiled, and run on the demo bundle by qemu-user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.engines.builds import ENGINES, run
from tests.engines.cases import Case, Made, generated_by_python, read_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "SSD_EXPORT_AARCH64" not in os.environ,
        reason="takes many minutes: SSD_EXPORT_AARCH64=1 make test TESTS=tests/engines",
    ),
]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CASES = [Case("ssd-auto"), Case("ssd-auto", options={"lookahead": 8, "seed": 1})]


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}: engines/scripts/install_dependencies.sh")


@pytest.fixture(scope="module")
def sysroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(COMPILER)
    folder = tmp_path_factory.mktemp("aarch64") / "root"
    fetched = run([ENGINES / "scripts" / "fetch_aarch64_sysroot.sh", folder])
    if fetched.returncode:
        reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"needs the libraries of Debian for arm64: {reason}")
    return folder


@pytest.fixture(scope="module")
def cross_built(sysroot: Path) -> Path:
    folder = sysroot.parent / "build"
    toolchain = ENGINES / "cmake" / "aarch64-linux-gnu.cmake"
    configured = run(
        ["cmake", "-S", ENGINES, "-B", folder, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
        + [f"-DSSD_SYSROOT={sysroot}", "-DSSD_RUNTIME_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
        + ["-DCMAKE_CXX_FLAGS=-O1"]
    )
    assert configured.returncode == 0, configured.stderr[-3000:]
    built = run(["cmake", "--build", folder, "--target", "ssd_cases"])
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-3000:]
    assert "warning:" not in built.stdout + built.stderr, built.stderr[-3000:]
    return folder


def test_it_is_compiled_for_aarch64(cross_built: Path) -> None:
    header = run(["readelf", "-h", cross_built / "libssd_runtime.so"]).stdout
    assert "AArch64" in header


def test_the_demo_under_emulation(
    cross_built: Path, sysroot: Path, bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    need(EMULATOR)
    made = run_emulated(cross_built, sysroot, bundles("ssd-auto"), tmp_path)
    for case, generated in zip(CASES, made, strict=True):
        assert "error" not in generated.facts, generated.facts
        expected = generated_by_python(case, bundles("ssd-auto"))
        np.testing.assert_array_equal(generated.tokens, expected.tokens)


def run_emulated(build: Path, sysroot: Path, bundle: Path, folder: Path) -> list[Made]:
    asked, answered = folder / "cases.json", folder / "results.bin"
    asked.write_text(json.dumps([case.to_json(bundle) for case in CASES]))
    command = [EMULATOR, "-L", sysroot, "-E", f"LD_LIBRARY_PATH={build}"]
    ran = run([*command, build / "tests" / "ssd_cases", asked, answered])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return read_results(answered, len(CASES))
