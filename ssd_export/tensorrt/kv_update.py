"""The decode step with TensorRT's own KV-cache-update layer, made from the bundle's."""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.step_form import KV_UPDATE, engine_spec

LAYER = "add_kv_cache_update"  # of INetworkDefinition: TensorRT-RTX, TensorRT 10.15 or newer


def kv_update_graph(bundle: Bundle, graph: str, flavor: Flavor) -> bytes:
    """A decode step of the bundle as a ModelProto that writes its caches by this layer.

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

    spec = engine_spec(bundle.config.graphs[graph], KV_UPDATE)
    shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    model = kv_update_model(ir.load(bundle.file(f"onnx/{graph}.onnx")), bundle.config, shapes)
    return ir.to_proto(model).SerializeToString()
