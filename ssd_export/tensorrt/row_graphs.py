"""A grid row as one CUDA graph: 24 decode steps, a release before those that need one (R7),
captured and replayed.

Rows whose releases fall on the same steps share a graph: a policy that releases once a row has one
graph for nearly all rows. The first row, whose token 0 the prefill drew, has one step less.
"""

from __future__ import annotations

from collections.abc import Callable

from ssd_export.tensorrt.cuda_device import CudaDevice, CudaGraph

MAX_GRAPHS = 12  # an evict_every that does not divide 24 gives many kinds of rows; the oldest graph then goes

RowKind = tuple[bool, ...]  # for each step of the row: does a release come before it?


class RowGraphs:
    """The graphs of one batch size; their addresses and sizes are those of the capture."""

    def __init__(
        self, device: CudaDevice, decode_step: Callable[[], None], evict: Callable[[], None]
    ) -> None:
        self._device, self._decode_step, self._evict = device, decode_step, evict
        self._graphs: dict[RowKind, CudaGraph] = {}

    @property
    def num_nodes(self) -> dict[RowKind, int]:
        """Nodes of each graph that was captured."""
        return {kind: graph.num_nodes for kind, graph in self._graphs.items()}

    def launch(self, kind: RowKind) -> None:
        """Queues a row; waits for nothing."""
        if kind not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._device.destroy(self._graphs.pop(next(iter(self._graphs))))
            self._graphs[kind] = self._device.capture(lambda: self._row(kind))
        self._device.launch(self._graphs[kind])

    def close(self) -> None:
        for graph in self._graphs.values():
            self._device.destroy(graph)
        self._graphs.clear()

    def _row(self, kind: RowKind) -> None:
        for release in kind:
            if release:
                self._evict()
            self._decode_step()
