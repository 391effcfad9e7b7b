"""Resources that the compiled attention kernels take of a GPU, read from their machine code:
registers, shared memory, loads in flight, programs that run at once. Needs Triton, no GPU.

    python -m benchmarks.kernel_code
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sass import (
    instructions,
    kernel_use,
    programs_per_multiprocessor,
    wide_loads_in_flight,
)
from ssd_export.dtypes import DTYPES as DTYPE_ROWS
from ssd_export.kernels.argument_types import argument_types
from ssd_export.kernels.compile import compile_kernel
from ssd_export.kernels.image import Variant
from ssd_export.report.measurement import measurement, table, write_measurement

JSON = Path("docs/measurements/kernel_code.json")
COMMAND = "python -m benchmarks.kernel_code"
TITLE = "The attention kernels at head_dim 128, by their machine code"
TARGETS = (80, 86, 87, 89, 90, 100, 120)
DTYPES = ("float16", "float32")  # bfloat16 is moved as float16 is
HEAD_DIM, MAX_SLOTS, MAX_PARTS = 128, 1024, 8
GROUP, LAYER, PART, COMBINE = "a group", "a layer", "a part of the slots", "its sum"
ATTENDING = (GROUP, LAYER, PART)  # the loop that reads keys and values is in these
COLUMNS = [
    "a launch for",
    "sm",
    "dtype",
    "registers",
    "spilled bytes",
    "shared memory, bytes",
    "16-byte loads in flight, a thread",
    "programs a multiprocessor",
    "KiB in flight, a multiprocessor",
]


@dataclass(frozen=True)
class KernelCode:
    """One compiled kernel. loads_in_flight: 16-byte ones of a thread, whenever it waits."""

    serves: str
    target: int
    dtype: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    loads_in_flight: int
    programs: int

    @property
    def row(self) -> list[str]:
        """Its row in the table."""
        in_flight = self.programs * self.num_warps * 32 * self.loads_in_flight * 16 >> 10
        numbers = (
            self.registers,
            self.stack_bytes,
            self.shared_bytes,
            self.loads_in_flight,
            self.programs,
            in_flight,
        )
        return [self.serves, str(self.target), self.dtype, *map(str, numbers)]


def read_kernel(target: int, dtype: str, serves: str = GROUP) -> KernelCode:
    """One of the kernels as it is compiled for a target."""
    kernel, compiled_in, num_warps = _kernel(dtype, serves)
    types = argument_types(kernel, compiled_in)
    variant = Variant(dtype, HEAD_DIM)
    compiled = compile_kernel(kernel, types, compiled_in, num_warps, target, variant)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        use, in_flight = kernel_use(cubin), wide_loads_in_flight(instructions(cubin))
    shared = compiled.metadata.shared
    return KernelCode(
        serves,
        target,
        dtype,
        use.registers,
        use.stack_bytes,
        shared,
        num_warps,
        in_flight,
        programs_per_multiprocessor(target, use, shared, num_warps),
    )


def _kernel(dtype: str, serves: str) -> tuple[Any, dict[str, int], int]:
    """A kernel, what is compiled into it, its number of warps."""
    from ssd_export.kernels import decode_attention, layer_attention, split_attention

    compiled_in = decode_attention.constants(HEAD_DIM, MAX_SLOTS, DTYPE_ROWS[dtype].num_bytes)
    kernel = {
        GROUP: decode_attention.decode_attention_kernel,
        LAYER: layer_attention.decode_layer_kernel,
        PART: split_attention.attend_split_kernel,
        COMBINE: split_attention.combine_splits_kernel,
    }[serves]
    if serves == COMBINE:
        compiled_in = {
            "HEAD_DIM": HEAD_DIM,
            "SLOT_CAPACITY": compiled_in["SLOT_CAPACITY"],
            "SPLIT_CAPACITY": MAX_PARTS,
        }
    return kernel, compiled_in, decode_attention.NUM_WARPS


def kernels(
    targets: Iterable[int] = TARGETS, dtypes: Iterable[str] = DTYPES
) -> Iterator[KernelCode]:
    """Every kernel for every target in every dtype."""
    for serves in (*ATTENDING, COMBINE):
        for target in targets:
            for dtype in dtypes:
                yield read_kernel(target, dtype, serves)


def results_of(read: list[KernelCode]) -> dict[str, object]:
    """The table and what it was made of."""
    rows = [kernel.row for kernel in read]
    return {"tables": [table(TITLE, COLUMNS, rows)], "kernels": [asdict(kernel) for kernel in read]}


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=JSON)
    asked = parser.parse_args()
    results = results_of(list(kernels()))
    write_measurement(asked.json, measurement(COMMAND, results))


if __name__ == "__main__":
    main()
