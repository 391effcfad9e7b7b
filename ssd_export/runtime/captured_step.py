"""A decode step of torch as one CUDA graph: what 400 launches a step cost the host, it pays once.

The step reads and writes tensors that stay where they are, counts itself on the device and asks
the host nothing, so one graph serves every token of every batch of its size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ssd_export.errors import first_line

Step = Callable[[], None]


class CapturedStep:
    """Runs the step once as it is, which compiles kernels and allocates workspaces; then captures
    it, and from there on replays.

    Args: capture: records a step without running it, and returns what runs it.
    """

    def __init__(self, step: Step, capture: Callable[[Step], Step]) -> None:
        self._step, self._capture = step, capture
        self._replay: Step | None = None
        self._is_warm = False

    def __call__(self) -> None:
        """Queues one step; waits for nothing."""
        if self._replay is None and self._is_warm:
            self._replay = self._captured()
        (self._replay or self._step)()
        self._is_warm = True

    def _captured(self) -> Step:
        try:
            return self._capture(self._step)
        except RuntimeError as error:
            warnings.warn(
                f"a decode step cannot be captured ({first_line(error)}); its kernels are"
                " launched one by one, which is slower",
                RuntimeWarning,
                stacklevel=4,
            )
            return self._step


def cuda_graph(step: Step) -> Step:
    """Captures a step as a CUDA graph of the current device. Raises: RuntimeError where it does
    what cannot be captured.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
