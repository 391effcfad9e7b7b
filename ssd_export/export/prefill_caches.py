"""The prefill as TensorRT-RTX and TensorRT 10.15 or newer serve it: keys and values of the prompt
written straight into the caches by the KV-cache-update layer.

The bundle's prefill returns them as [B, H, T, D], to be copied into caches of more slots: memory of
every layer's at once, and three times the bytes. Here a cache [B*H, 1, S, D] is an input whose
memory the output is, and the kernel that makes a layer's keys and values writes slots 0 to T - 1 of
it (R8). Places behind a prompt's end are written as zeros, so that a shorter prompt leaves the same
cache as a copy of its own tokens alone. Scores and positions, a few bytes a slot, stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from ssd_export.export.kv_update import OPSET
from ssd_export.export.operators import Operators, onnx_dtype
from ssd_export.graph_spec import GraphSpec


def prefill_into_caches(model: ir.Model, contract: GraphSpec, shaped: GraphSpec) -> ir.Model:
    """A prefill of the bundle in this form, over the same weights. Changes nothing of model.

    Args: contract: of this form (tensorrt/step_form.py); shaped: the same with the engine's shapes.
    """
    model, ops = model.clone(), Operators()
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name or "": value for value in model.graph.outputs}
    is_prompt = _is_prompt(ops, inputs["inputs_embeds"], inputs["prompt_length"])
    caches = {tensor.name: tensor for tensor in shaped.inputs if tensor.name not in inputs}
    for present, past in contract.aliases.items():
        tensor = caches[past]
        cache = ir.Value(
            name=past, shape=ir.Shape(tensor.shape), type=ir.TensorType(onnx_dtype(tensor.dtype))
        )
        rows = outputs[present]
        rows.name = f"{present}.prompt"
        outputs[present] = _written(ops, cache, rows, is_prompt, tensor.dtype)
        outputs[present].name = present
        outputs[present].shape, outputs[present].type = cache.shape, cache.type
        model.graph.inputs.append(cache)
    model.graph.outputs[:] = [outputs[tensor.name] for tensor in contract.outputs]
    model.graph.extend(ops.tape.nodes)
    model.graph.opset_imports[""] = OPSET
    return model


def _is_prompt(ops: Operators, embeds: ir.Value, prompt_length: ir.Value) -> ir.Value:
    """bool [B, 1, T, 1]: whether a place holds a token of its prompt."""
    num_tokens = ops.reshape(ops.op("Shape", embeds, start=1, end=2), [])
    place = ops.op("Range", ops.constant(0), num_tokens, ops.constant(1))
    place = ops.reshape(ops.cast(place, "int32"), [1, 1, -1, 1])
    return ops.op("Less", place, ops.reshape(prompt_length, [-1, 1, 1, 1]))


def _written(
    ops: Operators, cache: ir.Value, rows: ir.Value, is_prompt: ir.Value, dtype: str
) -> ir.Value:
    """The cache [B*H, 1, S, D] with rows [B, H, T, D] in its first slots."""
    held = ops.op("Where", is_prompt, rows, ops.constant(0, dtype))
    shape = ops.op("Shape", rows, start=2, end=4)
    shape = ops.op("Concat", ops.constant([-1, 1]), shape, axis=0)
    update = ops.op("Reshape", held, shape)
    cells = ops.op("Shape", update, start=0, end=1)
    first_slot = ops.op("Expand", ops.constant([0]), cells)
    return ops.op("TensorScatter", cache, update, first_slot, axis=2, mode="linear")
