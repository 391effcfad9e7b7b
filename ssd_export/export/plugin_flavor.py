"""The plugin flavor of a graph: the same nodes, left to the TensorRT plugin. Needs onnx_ir, not
torch.
"""

from __future__ import annotations

import onnx_ir as ir

from ssd_export.export.functions import DOMAIN, OP_TYPE

PLUGIN_VERSION = "3"  # kPluginVersion of the library


def plugin_flavor(model: ir.Model) -> ir.Model:
    """The same model for the TensorRT plugin: no functions, one node name.

    Before 10.7 a local function wins over a plugin of its name, since then the plugin wins. Before
    10.10 (JetPack 6.2 has 10.3) the parser looks for a plugin's namespace and version in attributes
    of these names alone, not in the node's domain.
    """
    model = model.clone()
    model.functions.clear()
    for node in model.graph:
        if node.domain == DOMAIN:
            node.op_type = OP_TYPE
            node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
            node.attributes["plugin_version"] = ir.AttrString("plugin_version", PLUGIN_VERSION)
    return model
