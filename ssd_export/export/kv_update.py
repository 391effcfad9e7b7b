"""The decode step as TensorRT-RTX and TensorRT 10.15 or newer serve it: caches written by the
KV-cache-update layer, read once.

In the form that the bundle has (functions.py, ONNX Runtime's), TensorRT copies every cache for each
ScatterND and again to reorder it for the products: about five times its bytes a step. Here
- key and value are written by TensorScatter, which TensorRT takes for its KVCacheUpdate layer: the
  cache is a network input [B*H, 1, S, D], its output the same memory, one row each is written;
- products over slots are written element by element and summed, in float32: TensorRT makes one
  kernel of a product and its sum, which reads the cache as it lies. A MatMul wants a number of
  slots that is a multiple of 8, and copies, pads or transposes otherwise; the attention kernel that
  it makes of MatMul, softmax and MatMul does not tell the probabilities that a score needs, and in
  a graph of fixed shapes it transposes the keys first;
- positions and scores are new tensors, a few bytes a slot.

Inputs and outputs are those of the node in functions.py but for the caches' shape. TensorScatter
has no int8, so caches in int8 keep the form of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ssd_export.bundle import BundleConfig
from ssd_export.export.functions import (
    DOMAIN,
    PROTECTED,
    AttentionNode,
    NodeInputs,
    find_slot,
    local_function,
)
from ssd_export.export.operators import Operators
from ssd_export.graph_spec import CacheTensor, Dimension

OPSET = 24  # the first with TensorScatter


def kv_update_model(
    model: ir.Model, config: BundleConfig, shapes: Mapping[str, tuple[Dimension, ...]]
) -> ir.Model:
    """A decode step of the bundle in this form, over the same weights. Changes nothing of model.

    Args: shapes: of inputs and outputs in this form.
    """
    model = model.clone()
    bodies: dict[AttentionNode, str] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            attention = _attention_of(node, config)
            node.op_type = bodies.setdefault(attention, node.op_type)
    model.functions.clear()
    for attention, op_type in bodies.items():
        function = kv_update_function(attention, op_type)
        model.functions[function.identifier()] = function
    model.graph.opset_imports[""] = OPSET
    for value in (*model.graph.inputs, *model.graph.outputs):
        # an input with a default stands beside the contract
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    return model


def _attention_of(node: ir.Node, config: BundleConfig) -> AttentionNode:
    names = (value.name or "" for value in node.inputs if value is not None)
    cache = next(cache for cache in map(CacheTensor.parse, names) if cache is not None)
    return AttentionNode.of(
        config.policy.layers[cache.layer][cache.group],
        config.policy,
        config.model.query_group_size,
        config.model.head_dim,
        config.dtype,
    )


def kv_update_function(node: AttentionNode, op_type: str) -> ir.Function:
    """The local function `ssd_export::op_type`; caches are [B*H, 1, S, D]."""
    return local_function(node, op_type, OPSET, _body)


def _body(ops: Operators, node: AttentionNode, inputs: NodeInputs) -> list[ir.Value]:
    position, prompt_length = (
        ops.reshape(row, [-1, 1, 1]) for row in (inputs.position, inputs.prompt_length)
    )
    past = inputs.past
    past_position, past_score = past["position"], past.get("score")
    slot, has_room = find_slot(ops, node, position, prompt_length, past_position, past_score)
    is_new = ops.op("Equal", ops.constant([[list(range(node.num_slots))]]), slot)  # [B, H, S]
    present = {"position": ops.op("Where", is_new, position, past_position)}
    for part, rows in (("key", inputs.key), ("value", inputs.value)):
        row = ops.reshape(rows, [-1, 1, 1, node.head_dim])
        place = ops.reshape(slot, [-1])
        present[part] = ops.op("TensorScatter", past[part], row, place, axis=2, mode="linear")
    empty = ops.op("Less", present["position"], ops.constant(0, "int32"))
    probs = _probabilities(ops, node, inputs.query, present["key"], empty)  # [B*H, G, S, 1]
    out = _weighted_values(ops, node, probs, present["value"])
    if past_score is not None:
        present["score"] = _present_score(ops, node, past_score, is_new, has_room, probs)
    num_queries = node.num_heads * node.query_group_size
    return [ops.reshape(out, [-1, num_queries, node.head_dim]), *(present[part] for part in past)]


def _probabilities(
    ops: Operators, node: AttentionNode, query: ir.Value, key: ir.Value, empty: ir.Value
) -> ir.Value:
    """float32 [B*H, G, S, 1] of query [B, H*G, D], key [B*H, 1, S, D] and empty [B, H, S]."""
    group = node.query_group_size
    queries = _wide(ops, node, ops.reshape(query, [-1, group, 1, node.head_dim]))
    scaled = ops.op("Mul", queries, ops.constant(node.head_dim**-0.5, "float32"))
    products = ops.op("Mul", _wide(ops, node, key), scaled)  # [B*H, G, S, D]
    logits = ops.op("ReduceSum", products, ops.constant([-1]), keepdims=1)
    mask = ops.reshape(empty, [-1, 1, node.num_slots, 1])
    masked = ops.op("Where", mask, ops.constant(-PROTECTED, "float32"), logits)
    return ops.op("Softmax", masked, axis=2)


def _weighted_values(
    ops: Operators, node: AttentionNode, probs: ir.Value, value: ir.Value
) -> ir.Value:
    """[B*H, G, D] of float32 probs [B*H, G, S, 1] and value [B*H, 1, S, D]."""
    weighted = ops.op("Mul", _wide(ops, node, value), probs)
    return _narrow(ops, node, ops.op("ReduceSum", weighted, ops.constant([2]), keepdims=0))


def _present_score(
    ops: Operators,
    node: AttentionNode,
    past_score: ir.Value,
    is_new: ir.Value,
    has_room: ir.Value | None,
    probs: ir.Value,
) -> ir.Value:
    """Scores float32 [B, H, S]: the old one, decayed at an eviction, plus what arrives now (R2)."""
    if has_room is not None and node.score_decay != 1:
        decay, one = (ops.constant(number, "float32") for number in (node.score_decay, 1.0))
        past_score = ops.op("Mul", past_score, ops.op("Where", has_room, one, decay))
    started = ops.op("Where", is_new, ops.constant(0.0, "float32"), past_score)
    received = ops.op("ReduceSum", probs, ops.constant([1, 3]), keepdims=0)  # over its queries
    return ops.op("Add", started, ops.reshape(received, [-1, node.num_heads, node.num_slots]))


def _wide(ops: Operators, node: AttentionNode, value: ir.Value) -> ir.Value:
    return value if node.dtype == "float32" else ops.cast(value, "float32")


def _narrow(ops: Operators, node: AttentionNode, value: ir.Value) -> ir.Value:
    return value if node.dtype == "float32" else ops.cast(value, node.dtype)
