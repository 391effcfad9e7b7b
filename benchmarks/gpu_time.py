"""Times on a GPU by CUDA events: what the device took, whatever the host was doing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

RUNS = 15
BYTES = 1 << 30  # of what is read and copied: more than any GPU keeps


@dataclass(frozen=True)
class Rates:
    """Bytes and float16 operations a second, by the median of RUNS runs."""

    read_bandwidth: float
    copy_bandwidth: float
    matrix_rate: float

    def to_dict(self) -> dict[str, float]:
        """The rates as plain data for a report."""
        return asdict(self)


def median_ms(works: Sequence[Callable[[], object]], runs: int = RUNS) -> float:
    """Milliseconds of one of the works, which are done one after the other, captured as one CUDA
    graph, so that the host's launches are not among what is measured.
    """
    replay = captured(works)
    taken = []
    for _ in range(runs):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        replay()
        ended.record()
        ended.synchronize()
        taken.append(began.elapsed_time(ended) / len(works))
    return statistics.median(taken)


def captured(works: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """The works as one launch. Each is done once before, which compiles kernels."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay


def measure_rates(size: int = 8192) -> Rates:
    """The rates of the first GPU: reading and copying a gigabyte of random numbers, and products of
    square matrices.
    """
    source = torch.randn(BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    reading = median_ms([lambda: torch.amax(source)])
    copying = median_ms([lambda: target.copy_(source)])
    matrix = torch.randn(size, size, device="cuda").half()
    multiplying = median_ms([lambda: matrix @ matrix])
    return Rates(
        1000 * BYTES / reading, 1000 * 2 * BYTES / copying, 1000 * 2 * size**3 / multiplying
    )
