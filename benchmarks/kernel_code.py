"""Resources that the compiled attention kernel takes of a GPU, read from its machine code:
registers, shared memory, loads in flight, programs that run at once. Needs Triton, no GPU.

    python -m benchmarks.kernel_code
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sass import (
    instructions,
    kernel_use,
    programs_per_multiprocessor,
    wide_loads_in_flight,
)
from ssd_export.kernels.compile import compile_image
from ssd_export.kernels.image import Variant
from ssd_export.report.measurement import measurement, table, write_measurement

JSON = Path("docs/measurements/kernel_code.json")
COMMAND = "python -m benchmarks.kernel_code"
TITLE = "The attention kernel at head_dim 128, by its machine code"
TARGETS = (80, 86, 87, 89, 90, 100, 120)
DTYPES = ("float16", "float32")  # bfloat16 is moved as float16 is
HEAD_DIM = 128
COLUMNS = [
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
        return [str(self.target), self.dtype, *map(str, numbers)]


def read_kernel(target: int, dtype: str, head_dim: int = HEAD_DIM) -> KernelCode:
    """The kernel as it is compiled for a target."""
    with tempfile.TemporaryDirectory() as folder:
        image = compile_image(Path(folder), target, Variant(dtype, head_dim))
        cubin = Path(folder) / image.cubin
        use, in_flight = kernel_use(cubin), wide_loads_in_flight(instructions(cubin))
    return KernelCode(
        target,
        dtype,
        use.registers,
        use.stack_bytes,
        image.shared_bytes,
        image.num_warps,
        in_flight,
        programs_per_multiprocessor(target, use, image.shared_bytes, image.num_warps),
    )


def kernels(
    targets: Iterable[int] = TARGETS, dtypes: Iterable[str] = DTYPES
) -> Iterator[KernelCode]:
    """Every target in every dtype."""
    for target in targets:
        for dtype in dtypes:
            yield read_kernel(target, dtype)


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
