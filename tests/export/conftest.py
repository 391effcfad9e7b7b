"""The library of operators, built once a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ssd_export.runtime.ort_operators import LIBRARY, LIBRARY_VARIABLE
from tests.engines.builds import build_operators
from tests.made_once import made_once, run_folder

AVX2 = {"avx2", "fma", "f16c", "bmi2"}
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDED_FLAGS = {
    "avx2": AVX2,
    "avxvnni": {*AVX2, "avx_vnni"},
    "avx512": AVX512,
    "avx512vnni": {*AVX512, "avx512_vnni"},
}


@pytest.fixture(scope="session")
def library(operators_of: Callable[[str], Path]) -> Path:
    """$SSD_EXPORT_OPERATORS, else built now."""
    asked = os.environ.get(LIBRARY_VARIABLE)
    return Path(asked) if asked else operators_of("")


@pytest.fixture(scope="session")
def operators_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The library for one instruction set whatever the processor, "" for the best that it has;
    skips with what this machine lacks.
    """
    folder = run_folder(tmp_path_factory) / "operators"

    def built(instructions: str) -> Path:
        if instructions != "baseline":
            processor = Path("/proc/cpuinfo")
            flags = processor.read_text(encoding="utf-8").split() if processor.exists() else []
            if not NEEDED_FLAGS.get(instructions, set()) <= set(flags):
                pytest.skip(f"needs a processor with {instructions}")
        options = [f"-DSSD_OPERATORS_ONLY={instructions}"] if instructions else []
        made = made_once(
            folder / (instructions or "best"), lambda place: build_operators(place, *options)
        )
        return made / LIBRARY

    return built
