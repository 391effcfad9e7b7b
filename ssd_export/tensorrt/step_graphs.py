"""What is launched again and again, as CUDA graphs captured once: the decode step with an eviction
before it and without, an eviction, and a pass of lookahead.

Nothing in a step depends on the host: the step's number is counted on the device, and each head
decides there whether it evicts (R7). The host only leaves out evictions that would find no full
head, which the prompts' lengths tell beforehand. So two graphs serve all tokens of all grid rows,
and launching one 24 times costs a row what one graph of 24 steps does, without the memory of 24
copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from ssd_export.tensorrt.cuda_device import CudaDevice, CudaGraph

STEP, EVICT_AND_STEP, EVICT = "step", "evict and step", "evict"


class StepGraphs:
    """The graphs of one batch size; their addresses and sizes are those of the capture.

    Args: work: what queues each kind; captures: False queues it anew every time, which takes the
    host longer.
    """

    def __init__(
        self, device: CudaDevice, work: Mapping[str, Callable[[], None]], captures: bool = True
    ) -> None:
        self._device, self._work, self._captures = device, work, captures
        self._graphs: dict[str, CudaGraph] = {}
        self.num_bytes = 0
        if not captures:
            _warn("TensorRT has no such kernels")

    @property
    def num_nodes(self) -> dict[str, int]:
        """Nodes of each graph that was captured; empty where steps are queued one by one."""
        return {kind: graph.num_nodes for kind, graph in self._graphs.items()}

    def launch(self, kind: str) -> None:
        """Queues work of a kind; waits for nothing."""
        if self._captures and kind not in self._graphs:
            self._capture(kind)
        if kind in self._graphs:
            self._device.launch(self._graphs[kind])
        else:
            self._work[kind]()

    def close(self) -> None:
        """Destroys the captured graphs."""
        with ExitStack() as all_of_them:
            for graph in self._graphs.values():
                all_of_them.callback(self._device.destroy, graph)
            self._graphs = {}

    def _capture(self, kind: str) -> None:
        free = self._device.memory_bytes()[0]
        try:
            self._graphs[kind] = self._device.capture(self._work[kind])
        except RuntimeError as error:
            self._captures = False
            _warn(str(error))
        self.num_bytes += max(0, free - self._device.memory_bytes()[0])


def _warn(reason: str) -> None:
    warnings.warn(
        f"a decode step cannot be captured ({reason}); steps are queued one by one, which is"
        " slower",
        RuntimeWarning,
        stacklevel=3,
    )
