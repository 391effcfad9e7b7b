"""The least time of a decode step: its bytes and operations over the rates measured on this
machine.

bound = max(bytes / bandwidth, operations / matrix rate). bytes: every weight that the step
multiplies by, as it is stored, and every cache once; operations: two for each weight and row, and
those of the attention over all slots. Two bandwidths are measured: of copying (bytes read and
written) and of reading (a matrix times a vector, which is what a step does); there is a bound by
each. rate: of square float32 products, on a GPU of products in the bundle's dtype. Integer kernels
can be above the float32 rate, so a share above 100 % is no error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.dtypes import DTYPES
from ssd_export.plan.lookahead import step_operations

ARRAY_BYTES = 128 << 20  # beyond every cache
ROW_LENGTH = 4096
MATRIX_SIZE = 1024
RUNS = 15


@dataclass(frozen=True)
class MachineRates:
    """Bytes and float operations a second, the best of RUNS runs. dtype: of the products."""

    read_bandwidth: float
    copy_bandwidth: float
    matrix_rate: float
    dtype: str
    threads: int

    def to_dict(self) -> dict[str, float | int | str]:
        """The rates as plain data for a report."""
        return asdict(self)


@dataclass(frozen=True)
class StepCost:
    """Bytes and operations that a decode step of a batch needs at least."""

    weight_bytes: int
    cache_bytes: int
    operations: int

    def bound_seconds(self, bandwidth: float, matrix_rate: float) -> float:
        """Least seconds of the step. bandwidth: bytes a second; matrix_rate: operations a
        second.
        """
        return max(
            (self.weight_bytes + self.cache_bytes) / bandwidth, self.operations / matrix_rate
        )

    def limit(self, rates: MachineRates) -> str:
        """The limiting resource: memory or arithmetic."""
        moving = (self.weight_bytes + self.cache_bytes) / rates.read_bandwidth
        return "memory" if moving >= self.operations / rates.matrix_rate else "arithmetic"


def measure_cpu(threads: int) -> MachineRates:
    """The rates of this many threads. The caller keeps the BLAS of numpy to as many
    (OMP_NUM_THREADS and the like).
    """
    source = np.ones((ARRAY_BYTES // 4 // ROW_LENGTH, ROW_LENGTH), np.float32)
    target, vector = np.empty_like(source), np.ones(ROW_LENGTH, np.float32)
    spans = [
        slice(part * len(source) // threads, (part + 1) * len(source) // threads)
        for part in range(threads)
    ]
    matrix = np.ones((MATRIX_SIZE, MATRIX_SIZE), np.float32)
    product = np.empty_like(matrix)
    clock = (
        time.process_time if threads == 1 else time.perf_counter
    )  # of one thread the same, but for other work
    with ThreadPoolExecutor(threads) as pool:
        copying = _best(
            lambda: list(pool.map(lambda span: np.copyto(target[span], source[span]), spans)), clock
        )
    reading = _best(lambda: source @ vector, clock)
    multiplying = _best(lambda: np.matmul(matrix, matrix, out=product), clock)
    return MachineRates(
        ARRAY_BYTES / reading,
        2 * ARRAY_BYTES / copying,
        2 * MATRIX_SIZE**3 / multiplying,
        "float32",
        threads,
    )


def measure_cuda(dtype: str) -> MachineRates:
    """The rates of the first GPU, by torch. Raises: ImportError or RuntimeError without torch for
    CUDA.
    """
    import torch

    source = torch.ones(4 * ARRAY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.ones(
        8 * MATRIX_SIZE, 8 * MATRIX_SIZE, device="cuda", dtype=getattr(torch, dtype)
    )

    def waited(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    copying = _best(waited(lambda: target.copy_(source)))
    reading = _best(waited(source.sum))
    multiplying = _best(waited(lambda: matrix @ matrix))
    moved = 4 * ARRAY_BYTES
    return MachineRates(
        moved / reading, 2 * moved / copying, 2 * (8 * MATRIX_SIZE) ** 3 / multiplying, dtype, 0
    )


def _best(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    work()
    seconds = []
    for _ in range(RUNS):
        began = clock()
        work()
        seconds.append(clock() - began)
    return min(seconds)


def step_cost(bundle: Bundle, batch: int) -> StepCost:
    """The cost of a decode step of this bundle for `batch` images (twice as many rows)."""
    config, table = bundle.config.model, bundle.config.policy
    rows = config.rows_per_image * batch
    operations = step_operations(config, table, batch)
    return StepCost(decode_weight_bytes(bundle), cache_read_bytes(bundle, rows), operations)


def decode_weight_bytes(bundle: Bundle) -> int:
    """Bytes of the weights that the decode step reads whole; a table that rows are gathered from is
    not among them.
    """
    import onnx_ir as ir  # here: rates of a machine need no graphs

    graph = ir.load(bundle.file("onnx/decode_step.onnx")).graph
    return sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if value.const_value is not None
        and not all(use.node.op_type.startswith("Gather") for use in value.uses())
    )


def cache_read_bytes(bundle: Bundle, rows: int) -> int:
    """Bytes of all cache tensors, each read once a step."""
    return sum(
        prod(rows if dimension == "rows" else int(dimension) for dimension in tensor.shape)
        * DTYPES[tensor.dtype].num_bytes
        for tensor in bundle.config.graphs["decode_step"].cache_inputs.values()
    )
