"""The decode step with operators of engines/operators (C++): one for a layer's attention, one for a
product, one for the gate of an MLP, one that draws the token.

Its contract is decode_step's, and so is its arithmetic but for the order of sums and, with weights
and caches in float16, what is computed in float32 between them; runners without the library run
decode_step itself. It evicts by itself (layer_attention.py). Passes of lookahead
have those for products and gates (window_writer.py).
"""

from __future__ import annotations

import onnx_ir as ir

from ssd_export.export.functions import DOMAIN
from ssd_export.export.layer_attention import layer_attention
from ssd_export.export.onnx_writer import (
    FINAL_NORM,
    GraphWriter,
    attention_nodes,
    begin_step,
    cache_tensors,
    draw,
    image_logits,
    mlp,
    norm_name,
    rms_norm,
    rope_angles,
    step_outputs,
)
from ssd_export.graph_spec import GraphSpec

CONTRIBUTED = "com.microsoft"  # operators that every ONNX Runtime has


def write_fused_step(writer: GraphWriter, top_k: bool = False) -> tuple[GraphSpec, ir.Model]:
    """Writes decode_step with these operators; the writer uses them."""
    config, ops = writer.config, writer.ops
    spec, inputs, hidden, token = begin_step(writer, top_k, rope_angles)
    outputs: dict[str, ir.Value] = {}
    normed = rms_norm(writer, hidden, norm_name(0))
    for layer in range(config.num_layers):
        nodes = attention_nodes(writer, layer)
        caches = [
            cache for index, node in enumerate(nodes) for cache in cache_tensors(layer, index, node)
        ]
        qkv = writer.linear(normed, f"layers.{layer}.qkv")
        past = [inputs[cache.past] for cache in caches]
        merged, present = layer_attention(ops, nodes, [qkv, *token], past)
        outputs |= {cache.present: own for cache, own in zip(caches, present, strict=True)}
        hidden, normed = _after_attention(writer, hidden, merged, layer)
    logits = image_logits(writer, normed)
    token_drawn = (
        draw(writer, logits, inputs["step"], inputs) if top_k else _draw(writer, logits, inputs)
    )
    outputs |= step_outputs(writer, inputs, token_drawn, logits)
    model = writer.model(spec, inputs, outputs)
    model.graph.opset_imports[CONTRIBUTED] = 1
    return spec, model


def _after_attention(
    writer: GraphWriter, hidden: ir.Value, attended: ir.Value, layer: int
) -> tuple[ir.Value, ir.Value]:
    """(the residual stream after a layer, the same normed for what comes next)."""
    source = f"language_model.layers.{layer}"
    projected = writer.linear(attended, f"layers.{layer}.o")
    weight = f"{source}.post_attention_layernorm.weight"
    hidden, normed = _add_and_norm(writer, hidden, projected, weight)
    is_last = layer == writer.config.num_layers - 1
    following = FINAL_NORM if is_last else norm_name(layer + 1)
    return _add_and_norm(writer, hidden, mlp(writer, normed, layer), following)


def _add_and_norm(
    writer: GraphWriter, hidden: ir.Value, change: ir.Value, weight: str
) -> tuple[ir.Value, ir.Value]:
    """(hidden + change, its RMSNorm)."""
    normed, _, _, added = writer.ops.many(
        "SkipSimplifiedLayerNormalization",
        hidden,
        change,
        writer.weight(weight),
        domain=CONTRIBUTED,
        num_outputs=4,
        epsilon=float(writer.config.rms_norm_eps),
    )
    return added, normed


def _draw(writer: GraphWriter, logits: ir.Value, inputs: dict[str, ir.Value]) -> ir.Value:
    """The tokens of a step, int32 [N]."""
    operands = [inputs[name] for name in ("noise", "step", "cfg_scale", "temperature")]
    return writer.ops.many("DrawToken", logits, *operands, domain=DOMAIN, num_outputs=1)[0]
