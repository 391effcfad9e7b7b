"""The compiled kernel keeps enough loads on their way, spills nothing, and runs as often at once as
the table in the documents says: read from its machine code, which needs no GPU.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernel_code import (
    ATTENDING,
    COMBINE,
    HEAD_DIM,
    JSON,
    MAX_SLOTS,
    TARGETS,
    KernelCode,
    read_code,
    read_kernel,
)
from benchmarks.sass import (
    Instruction,
    KernelUse,
    loops,
    programs_per_multiprocessor,
    wide_loads_in_flight,
)
from ssd_export.kernels.image import ATTEND, SETTLE_KERNELS, WINDOW_KERNELS, Variant

ROOT = Path(__file__).parents[2]
LEAST_IN_FLIGHT = 6
LEAST_PROGRAMS = 3  # fewer leave a multiprocessor idle while one of them waits
COMPILED = (80, 87, 90, 120)  # here; the table is checked for all of them
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install ssd-export[kernels]"
)


def published() -> dict[tuple[str, int, str], KernelCode]:
    kernels = json.loads((ROOT / JSON).read_text())["results"]["kernels"]
    read = [KernelCode(**row) for row in kernels]
    return {(kernel.serves, kernel.target, kernel.dtype): kernel for kernel in read}


def faults(kernel: KernelCode) -> list[str]:
    """What is wrong with a kernel that attends, naming it."""
    name = f"{kernel.serves}, sm_{kernel.target}, {kernel.dtype}"
    found = {
        f"{kernel.loads_in_flight} loads in flight": kernel.loads_in_flight < LEAST_IN_FLIGHT,
        f"{kernel.stack_bytes} bytes spilled": kernel.stack_bytes > 0,
        f"{kernel.programs} programs a multiprocessor": kernel.programs < LEAST_PROGRAMS,
    }
    return [f"{name}: {what}" for what, is_wrong in found.items() if is_wrong]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("serves", ATTENDING)
def test_enough_loads_are_in_flight_and_nothing_is_spilled(
    target: int, dtype: str, serves: str
) -> None:
    import triton

    kernel = read_kernel(target, dtype, serves)
    assert faults(kernel) == []
    if triton.__version__.startswith("3.9."):  # another compiler chooses other registers
        assert kernel == published()[serves, target, dtype]


@needs_triton
@pytest.mark.parametrize(
    ("stages", "said"),
    [(1, r"\d loads in flight"), (10, r"[12] programs a multiprocessor")],
    ids=["loads when it uses", "loads too far ahead"],
)
def test_a_loop_that_loads_too_late_or_too_much_is_seen(
    stages: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.kernels import constants

    monkeypatch.setattr(constants, "NUM_STAGES", {2: stages, 4: stages})
    found = faults(read_kernel(80, "float16"))
    assert any(re.fullmatch(rf"[\w ]+, sm_80, float16: {said}", fault) for fault in found), found


@needs_triton
def test_a_kernel_that_spills_registers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled = triton.compile

    def with_few_registers(source: Any, target: Any, options: dict[str, Any]) -> Any:
        return compiled(source, target=target, options=options | {"maxnreg": 64})

    monkeypatch.setattr(triton, "compile", with_few_registers)
    found = faults(read_kernel(80, "float16"))
    assert re.fullmatch(r"[\w ]+, sm_80, float16: \d+ bytes spilled", found[0]), found


def test_the_table_is_what_registers_and_shared_memory_allow() -> None:
    found = published()
    assert {(target, dtype) for target in TARGETS for dtype in ("float16", "float32")} == {
        key[1:] for key in found
    }
    for kernel in found.values():
        assert kernel.stack_bytes == 0
        assert kernel.serves == COMBINE or kernel.loads_in_flight >= LEAST_IN_FLIGHT
        use = KernelUse(kernel.registers, kernel.stack_bytes)
        assert kernel.programs == programs_per_multiprocessor(
            kernel.target, use, kernel.shared_bytes, kernel.num_warps
        )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_kernels_of_a_window_spill_nothing(target: int, dtype: str) -> None:
    from ssd_export.kernels.compile import kernel_source

    for name in (*WINDOW_KERNELS, *SETTLE_KERNELS):
        source = kernel_source(name, Variant(dtype, HEAD_DIM), MAX_SLOTS)
        code = read_code(*source, target, dtype, name)
        assert code.stack_bytes == 0 and code.programs >= LEAST_PROGRAMS
        if name == ATTEND:
            assert faults(code) == []


@needs_triton
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_adds_the_parts_up_is_small(dtype: str) -> None:
    kernel = read_kernel(90, dtype, COMBINE)
    assert kernel.stack_bytes == 0 and kernel.programs >= 4


def code(*lines: str) -> list[Instruction]:
    return [Instruction(16 * number, line) for number, line in enumerate(lines)]


PLAIN = code(
    "MOV R1, R2",
    "LDG.E.128 R4, [R40.64]",
    "LDG.E.128 R8, [R40.64+0x10]",
    "FADD R0, R0, R4",
    "FADD R0, R0, R8",
    "BRA 0x10",
)
COPIES = "LDGSTS.E.BYPASS.128 [R5], [R64.64]"
AHEAD = code(
    *[COPIES, COPIES, "LDGDEPBAR"] * 3,
    "DEPBAR.LE SB0, 0x2",
    *[COPIES, COPIES, "LDGDEPBAR"],
    "BRA 0x90",
)


def test_a_plain_load_is_in_flight_until_it_is_used() -> None:
    assert loops(PLAIN) == [(1, 5)] and wide_loads_in_flight(PLAIN) == 1


def test_copies_are_in_flight_until_their_group_is_waited_for() -> None:
    assert wide_loads_in_flight(AHEAD) == 6


def test_without_a_loop_that_loads_nothing_is_in_flight() -> None:
    assert wide_loads_in_flight(PLAIN[:5]) == 0


@pytest.mark.parametrize(
    ("target", "registers", "shared", "programs"),
    [
        (80, 128, 33088, 4),
        (86, 168, 33088, 3),
        (89, 128, 33152, 2),
        (90, 96, 0, 5),
        (87, 32, 0, 12),
    ],
)
def test_programs_are_limited_by_registers_shared_memory_and_warps(
    target: int, registers: int, shared: int, programs: int
) -> None:
    assert programs_per_multiprocessor(target, KernelUse(registers, 0), shared, 4) == programs
