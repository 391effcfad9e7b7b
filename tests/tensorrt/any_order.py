"""Runs an ONNX graph as a compiler may: nodes in any order that their inputs allow, outputs that
are shared in place written over their inputs the moment they are computed.

ONNX Runtime runs nodes one after the other in the file's order; an engine does not. What is right
only by luck of the order differs here from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np
import onnx
from onnx import inliner
from onnx.reference import ReferenceEvaluator


class AnyOrder:
    """A graph with its local functions inlined; external weights are read from its folder."""

    def __init__(self, path: str) -> None:
        self._model = inliner.inline_local_functions(onnx.load(path))
        evaluator = ReferenceEvaluator(self._model)
        self._weights = dict(evaluator.rt_inits_)
        self._nodes = [
            (list(node.input), list(node.output), runnable)
            for node, runnable in zip(self._model.graph.node, evaluator.rt_nodes_, strict=True)
        ]

    def run(
        self, buffers: Mapping[str, np.ndarray], shared: Mapping[str, str], random: Random
    ) -> dict[str, np.ndarray]:
        """Outputs by name, the shared ones being the buffers that were overwritten.

        Args: buffers: inputs, by name; shared: output -> the input whose memory it is.
        """
        values = {"": None} | self._weights | dict(buffers)
        left = list(self._nodes)
        while left:
            ready = [
                place
                for place, (inputs, _, _) in enumerate(left)
                if all(name in values for name in inputs)
            ]
            inputs, outputs, runnable = left.pop(random.choice(ready))
            made = runnable.run(*[values[name] for name in inputs])
            for name, value in zip(outputs, made, strict=False):
                if name in shared:
                    np.copyto(values[shared[name]], value)
                    value = values[shared[name]]
                values[name] = value
        return {output.name: values[output.name] for output in self._model.graph.output}
