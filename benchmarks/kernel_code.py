"""Resources that the compiled attention kernels take of a GPU, read from their machine code:
registers, shared memory, loads in flight, programs that run at once. Needs Triton, no GPU.

    python -m benchmarks.kernel_code
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sass import (
    instructions,
    kernel_use,
    programs_per_multiprocessor,
    wide_loads_in_flight,
)
from ssd_export.kernels import image
from ssd_export.kernels.argument_types import argument_types
from ssd_export.kernels.compile import compile_kernel, kernel_source
from ssd_export.report.measurement import measurement, table, write_measurement

JSON = Path("docs/measurements/kernel_code.json")
COMMAND = "python -m benchmarks.kernel_code"
TITLE = "The attention kernels at head_dim 128, by their machine code"
TARGETS = (80, 86, 87, 89, 90, 100, 120)
DTYPES = ("float16", "float32")  # bfloat16 is moved as float16 is
HEAD_DIM, MAX_SLOTS = 128, 1024
LAYER, PART, COMBINE = "a layer", "a part of the slots", "its sum"
KERNELS = {LAYER: image.LAYER, PART: image.PART, COMBINE: image.SUM}
ATTENDING = (LAYER, PART)  # the loop that reads keys and values is in these
COLUMNS = [
    "a launch for",
    "sm",
    "dtype",
    "registers",
    "spilled bytes",
    "shared memory, bytes",
    "instructions",
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
    instructions: int
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
            self.instructions,
            self.loads_in_flight,
            self.programs,
            in_flight,
        )
        return [self.serves, str(self.target), self.dtype, *map(str, numbers)]


def read_kernel(target: int, dtype: str, serves: str = LAYER) -> KernelCode:
    """One of the kernels as it is compiled for a target, for the plugin and, but for what torch
    knows of its tensors, for the torch runner.
    """
    variant = image.Variant(dtype, HEAD_DIM)
    return read_code(*kernel_source(KERNELS[serves], variant, MAX_SLOTS), target, dtype, serves)


def read_code(
    kernel: Any, compiled_in: Mapping[str, int], target: int, dtype: str, serves: str
) -> KernelCode:
    """Any of the kernels' sources as it is compiled for a target. compiled_in: its constants."""
    from ssd_export.kernels.constants import NUM_WARPS

    variant, types = image.Variant(dtype, HEAD_DIM), argument_types(kernel, compiled_in)
    compiled = compile_kernel(kernel, types, compiled_in, target, variant)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        use, code = kernel_use(cubin), instructions(cubin)
    shared = compiled.metadata.shared
    return KernelCode(
        serves,
        target,
        dtype,
        use.registers,
        use.stack_bytes,
        shared,
        NUM_WARPS,
        len(code),
        wide_loads_in_flight(code),
        programs_per_multiprocessor(target, use, shared, NUM_WARPS),
    )


def kernels(
    targets: Iterable[int] = TARGETS, dtypes: Iterable[str] = DTYPES
) -> Iterator[KernelCode]:
    """Every kernel for every target in every dtype."""
    for serves in KERNELS:
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
