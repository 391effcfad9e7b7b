"""The graphs that write caches with TensorRT's own KV-cache-update layer, made from the bundle's:
the decode step and the prefill.
"""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.step_form import KV_UPDATE, PREFILL, engine_contract, engine_spec

LAYER = "add_kv_cache_update"  # of INetworkDefinition: TensorRT-RTX, TensorRT 10.15 or newer


def kv_update_graph(bundle: Bundle, graph: str, flavor: Flavor) -> bytes:
    """A decode step or prefill of the bundle as a ModelProto that writes its caches by this layer.

    Raises: UserError, one line, where this TensorRT has no such layer, it has none for caches of
    this dtype, or onnx-ir is not installed.
    """
    if not hasattr(flavor.trt.INetworkDefinition, LAYER):
        raise UserError(
            f"{flavor.name} {flavor.version} has no KV-cache-update layer (10.15 or newer has)"
        )
    if bundle.config.policy.kv_dtype != "model":
        raise UserError(f"{flavor.name} has no KV-cache-update layer for int8")
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise UserError("the kv-update form is made with onnx-ir: pip install onnx-ir") from error
    from ssd_export.export.kv_update import kv_update_model
    from ssd_export.export.prefill_caches import prefill_into_caches

    contract = engine_contract(bundle.config.graphs, graph, is_in_place=True)
    shaped = engine_spec(contract, KV_UPDATE)
    model = ir.load(bundle.file(f"onnx/{graph}.onnx"))
    if graph.startswith(PREFILL):
        model = prefill_into_caches(model, contract, shaped)
    else:
        shapes = {tensor.name: tensor.shape for tensor in (*shaped.inputs, *shaped.outputs)}
        model = kv_update_model(model, bundle.config, shapes)
    return ir.to_proto(model).SerializeToString()
