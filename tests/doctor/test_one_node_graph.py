"""The graph written byte by byte is the one that onnx and onnxruntime read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort

from ssd_export.doctor import probes
from ssd_export.doctor.one_node_graph import VALUE, one_node_model


def test_onnx_reads_the_model_that_was_meant() -> None:
    model = onnx.load_from_string(one_node_model())
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Add", ["x", "x"], ["y"])


def test_onnxruntime_runs_it() -> None:
    session = ort.InferenceSession(one_node_model(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([VALUE], np.float32)})
    assert found.tolist() == [2 * VALUE]
    assert probes.provider("CPUExecutionProvider") == {}
