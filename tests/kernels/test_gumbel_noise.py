"""The noise kernel: numpy's bits in Triton's interpreter, and a committed PTX that is this source's
and fuses nothing."""

from __future__ import annotations

import re

import pytest

from ssd_export.kernels.noise_image import ENTRY, NUM_WARPS, PTX_FILE, compile_noise_kernel
from tests.kernels.interpreted import interpreted_lines

PTX = PTX_FILE.read_text(encoding="ascii")


def test_the_kernel_writes_the_bits_of_numpy() -> None:
    lines = interpreted_lines("-m", "tests.kernels.interpret_noise")
    assert [line["codebook_size"] for line in lines] == [50, 1664, 2051, 4]
    for line in lines:
        assert line["different"] == 0 and line["written_outside"] == 0, line


def test_the_committed_ptx_rounds_every_operation_once() -> None:
    operations = re.findall(r"\b(?:fma|mad|mul|add|sub|div|neg)\.[\w.]*f32\b", PTX)
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32"} <= set(operations)
    assert set(operations) <= {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32", "neg.f32"}
    assert f".visible .entry {ENTRY}(" in PTX and PTX.count(".param .u") == 7
    assert f".reqntid {32 * NUM_WARPS}\n" in PTX and ".target sm_75\n" in PTX


def test_the_committed_ptx_is_what_the_source_compiles_to() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set, which interprets kernels instead of compiling them")
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"Triton {triton.__version__} writes other PTX than the 3.9 that made the file")
    assert compile_noise_kernel() == PTX
