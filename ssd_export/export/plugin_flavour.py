"""The plugin flavour of a graph: the same nodes, left to the TensorRT plugin. Needs onnx_ir, not
torch.
"""

from __future__ import annotations

import onnx_ir as ir

from ssd_export.export.functions import DOMAIN, OP_TYPE


def plugin_flavour(model: ir.Model) -> ir.Model:
    """The same model for the TensorRT plugin: no functions (one would win over the plugin), one
    node name.
    """
    model = model.clone()
    model.functions.clear()
    for node in model.graph:
        if node.domain == DOMAIN:
            node.op_type = OP_TYPE
    return model
