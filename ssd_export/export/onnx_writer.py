"""Writes prefill, decode_step and evict as ONNX graphs of ordinary operators (opset 18, TensorRT
10.3's floor; 19 with int8 or fp8 weights, 21 with int4).

The graphs hold no weights: initializers point into the weights file, so a graph of any model size
is built in milliseconds and a few hundred kilobytes. float32 inside at every dtype: RMSNorm, RoPE
angles, softmax, scores, sampling. Source of the arithmetic: ssd_export/model/decoder.py and
cache/attention.py, the torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ssd_export.bundle import graphs
from ssd_export.bundle.graphs import head_groups
from ssd_export.config import ModelConfig
from ssd_export.dtypes import of_torch
from ssd_export.export.functions import (
    DOMAIN,
    OP_TYPE,
    AttentionNode,
    attention_function,
    eviction_nodes,
    quantize_rows,
)
from ssd_export.export.operators import IR_VERSION, Operators, onnx_dtype
from ssd_export.export.quantize import (
    dequantize_node,
    onnx_type,
    opset_of,
    reads_codes,
    scale_name,
)
from ssd_export.export.sampler import draw_tokens, noise_of_step, num_sorted_input
from ssd_export.export.weights import WEIGHTS_FILE, Weight
from ssd_export.graph_spec import NUM_SORTED_CODES, CacheTensor, GraphSpec, TensorSpec
from ssd_export.model.decoder import rope_of
from ssd_export.policy.layout import query_slices
from ssd_export.policy.table import HeadGroup, PolicyTable

MASKED = -3.0e38
FINAL_NORM = "language_model.norm.weight"


@dataclass
class GraphWriter:
    """State shared by the parts of one graph: the recorder, the model's numbers, the places of the
    weights.

    dtype: of what is computed; bundle_dtype: of weights and caches, where it is another one.
    """

    config: ModelConfig
    table: PolicyTable
    dtype: str
    weights: dict[str, Weight]
    places: dict[str, tuple[int, int]]
    uses_operators: bool = False  # those of engines/operators
    bundle_dtype: str = ""
    ops: Operators = field(default_factory=Operators)
    _initializers: dict[str, ir.Value] = field(default_factory=dict)
    _widened: dict[str, ir.Value] = field(default_factory=dict)
    _defaults: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bundle_dtype = self.bundle_dtype or self.dtype

    def weight(self, name: str) -> ir.Value:
        """A tensor of the weights file, in the dtype of what is computed where it is a float."""
        stored = self._stored(name)
        if self.bundle_dtype == self.dtype or stored.dtype != onnx_dtype(self.bundle_dtype):
            return stored
        if name not in self._widened:
            self._widened[name] = self.ops.cast(stored, self.dtype)
        return self._widened[name]

    def _stored(self, name: str) -> ir.Value:
        return self._initializer(name, *onnx_type(self.weights[name]))

    def attention_node(self, group: HeadGroup) -> AttentionNode:
        """The attention of a head group in this graph."""
        sizes = self.config.query_group_size, self.config.head_dim, self.dtype
        node = AttentionNode.of(group, self.table, *sizes)
        if node.kv_dtype == "model" and self.bundle_dtype != self.dtype:
            return replace(node, kv_dtype=self.bundle_dtype)
        return node

    def _stored_codes(self, name: str) -> ir.Value:
        """Codes as they are stored: two of int4 in a byte."""
        weight = self.weights[name]
        return self._initializer(name, onnx_dtype(of_torch(weight.dtype).name), weight.shape)

    def _initializer(self, name: str, dtype: ir.DataType, dimensions: tuple[int, ...]) -> ir.Value:
        if name not in self._initializers:
            offset, length = self.places[name]
            shape = ir.Shape(dimensions)
            tensor = ir.ExternalTensor(WEIGHTS_FILE, offset, length, dtype, shape=shape, name=name)
            self._initializers[name] = ir.Value(
                name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor
            )
        return self._initializers[name]

    def matrix(self, name: str) -> ir.Value:
        """A matrix [in, out] in the model's dtype, whatever it is stored in."""
        scheme = self.weights[name].scheme
        if scheme is None:
            return self.weight(name)
        return dequantize_node(self.ops, self.weight(name), self.weight(scale_name(name)), scheme)

    def num_sorted_codes(self) -> ir.Value:
        """The input of top-k that has a default (sampler.py)."""
        self._defaults = [num_sorted_input(self.config.codebook_size)]
        return self._defaults[0]

    @property
    def opset(self) -> int:
        """The least opset that the stored weights need."""
        return opset_of(self.weights.values())

    def linear(self, x: ir.Value, name: str, bias: bool = False) -> ir.Value:
        """x [..., in] times the weight of a linear layer, plus its bias: [..., out]."""
        if self.uses_operators and self._has_operator(name):
            return self._linear_by_operator(x, name, bias)
        product = self.ops.op("MatMul", x, self.matrix(name), name=f"{name}.product")
        return self.ops.op("Add", product, self.weight(f"{name}.bias")) if bias else product

    def _has_operator(self, name: str) -> bool:
        return self.weights[name].scheme is None or reads_codes(self.weights[name])

    def _linear_by_operator(self, x: ir.Value, name: str, bias: bool) -> ir.Value:
        scheme, biases = self.weights[name].scheme, []
        if bias:
            biases.append(self.weight(f"{name}.bias"))
        if scheme is None:
            operands = [x, self._stored(name), *biases]
            return self.ops.many("PackedMatMul", *operands, domain=DOMAIN, num_outputs=1)[0]
        operands = [x, self._stored_codes(name), self.weight(scale_name(name)), *biases]
        bits = {"int4": 4, "int8": 8}[scheme.format]
        return self.ops.many(
            "QuantizedMatMul",
            *operands,
            domain=DOMAIN,
            num_outputs=1,
            bits=bits,
            block=scheme.block,
        )[0]

    def model(
        self,
        spec: GraphSpec,
        inputs: dict[str, ir.Value],
        outputs: dict[str, ir.Value],
        functions: Sequence[ir.Function] = (),
    ) -> ir.Model:
        """The recorded nodes between the inputs and outputs of a spec, checked to be all there."""
        for out in spec.outputs:
            outputs[out.name].name = out.name
            outputs[out.name].type = ir.TensorType(onnx_dtype(out.dtype))
            outputs[out.name].shape = ir.Shape(out.shape)
        imports = {"": self.opset} | ({DOMAIN: 1} if functions or self.uses_operators else {})
        graph = ir.Graph(
            [*(inputs[tensor.name] for tensor in spec.inputs), *self._defaults],
            [outputs[tensor.name] for tensor in spec.outputs],
            nodes=self.ops.tape.nodes,
            initializers=[*self._initializers.values(), *self._defaults],
            opset_imports=imports,
            name=spec.name,
        )
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name="ssd-export", functions=list(functions)
        )


# cos and sin of positions and prompt_length, int32 [..., 1, 1, 1].
Rope = Callable[[GraphWriter, ir.Value, ir.Value], tuple[ir.Value, ir.Value]]


def graph_inputs(spec: GraphSpec) -> dict[str, ir.Value]:
    """A value for each input of a contract, by name."""
    return {tensor.name: _value(tensor) for tensor in spec.inputs}


def _value(tensor: TensorSpec) -> ir.Value:
    return ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(onnx_dtype(tensor.dtype))
    )


def write_decode_step(writer: GraphWriter, top_k: bool = False) -> tuple[GraphSpec, ir.Model]:
    """One step: the token before -> the next token, every cache written in place."""
    spec, inputs, hidden, token = begin_step(writer, top_k, rope_tables)
    functions = AttentionFunctions()
    outputs: dict[str, ir.Value] = {}
    for layer in range(writer.config.num_layers):
        normed = rms_norm(writer, hidden, norm_name(layer))
        merged, present = _attention(writer, functions, layer, normed, token, inputs)
        outputs |= present
        hidden = after_attention(writer, hidden, merged, layer)
    logits = image_logits(writer, rms_norm(writer, hidden, FINAL_NORM))
    outputs |= step_outputs(writer, inputs, draw(writer, logits, inputs["step"], inputs), logits)
    return spec, writer.model(spec, inputs, outputs, functions.all(writer.opset))


def begin_step(
    writer: GraphWriter, top_k: bool, rope: Rope
) -> tuple[GraphSpec, dict[str, ir.Value], ir.Value, list[ir.Value]]:
    """What every form of a step begins with: its contract, its inputs, the hidden states
    [B, hidden_size] of the token before it, and of that token cos and sin of RoPE, position and
    prompt_length int32 [B].
    """
    ops = writer.ops
    spec = graphs.decode_step_spec(writer.config, writer.table, writer.bundle_dtype, top_k)
    inputs = graph_inputs(spec)
    hidden, position = _token_before(writer, inputs)
    prompt_length = inputs["prompt_length"]
    places = (ops.reshape(one, [-1, 1, 1, 1]) for one in (position, prompt_length))
    return spec, inputs, hidden, [*rope(writer, *places), position, prompt_length]


def _token_before(writer: GraphWriter, inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """(hidden states [B, hidden_size] of the token before a step, its position int32 [B])."""
    config, ops = writer.config, writer.ops
    place = ops.op("Sub", inputs["step"], ops.constant([1]))
    before = ops.op("Gather", inputs["tokens"], place, axis=0)  # [1, N]
    one = embed_image_token(writer, ops.reshape(before, [-1]))
    rows = [one] * config.rows_per_image
    hidden = ops.op("Concat", *rows, axis=0) if len(rows) > 1 else one
    return hidden, ops.op("Add", inputs["prompt_length"], ops.cast(place, "int32"))


def step_outputs(
    writer: GraphWriter, inputs: dict[str, ir.Value], token: ir.Value, logits: ir.Value
) -> dict[str, ir.Value]:
    """The outputs of a step beside its caches. token: int32 [N]."""
    ops, step = writer.ops, inputs["step"]
    return {
        "present_tokens": ops.op(
            "ScatterND", inputs["tokens"], ops.reshape(step, [1, 1]), ops.reshape(token, [1, -1])
        ),
        "next_step": ops.op("Add", step, ops.constant([1])),
        "logits": logits,
    }


def _attention(
    writer: GraphWriter,
    functions: AttentionFunctions,
    layer: int,
    normed: ir.Value,
    token: Sequence[ir.Value],
    inputs: dict[str, ir.Value],
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """A node for each head group: (out [B, HQ*D], present tensors by name).

    Args: token: cos and sin of RoPE, position and prompt_length int32 [B].
    """
    ops, (cos, sin, *place) = writer.ops, token
    queries, keys, values = heads_of(writer, normed, layer, cos, sin)
    attended: list[ir.Value] = []
    outputs: dict[str, ir.Value] = {}
    for index, node in enumerate(attention_nodes(writer, layer)):
        caches = cache_tensors(layer, index, node)
        rows = queries[index], keys[index], values[index]
        past = [inputs[cache.past] for cache in caches]
        out, *present = functions.call(ops, node, *rows, *place, *past)
        attended.append(out)
        outputs |= {cache.present: value for cache, value in zip(caches, present, strict=True)}
    merged = attended[0] if len(attended) == 1 else ops.op("Concat", *attended, axis=1)
    return ops.reshape(merged, [0, -1]), outputs


def attention_nodes(writer: GraphWriter, layer: int) -> list[AttentionNode]:
    """The node of each head group of a layer."""
    return [writer.attention_node(group) for group in writer.table.layers[layer]]


def cache_tensors(layer: int, index: int, node: AttentionNode) -> list[CacheTensor]:
    """The caches of a head group, in the order of its parts."""
    parts = graphs.part_names(node.rule, node.kv_dtype)
    return [CacheTensor(layer, index, part) for part in parts]


def write_prefill(writer: GraphWriter, top_k: bool = False) -> tuple[GraphSpec, ir.Model]:
    """The prompt: token 0, and keys, values and scores of the prompt (R8)."""
    config, ops = writer.config, writer.ops
    spec = graphs.prefill_spec(config, writer.table, writer.bundle_dtype, top_k)
    inputs = graph_inputs(spec)
    prompt_length = inputs["prompt_length"]
    embeds = inputs["inputs_embeds"]
    num_tokens = ops.op("Shape", embeds, start=1, end=2)
    place = ops.op("Range", ops.constant(0), ops.reshape(num_tokens, []), ops.constant(1))
    end = ops.reshape(prompt_length, [-1, 1, 1, 1, 1])
    cos, sin = rope_tables(writer, ops.reshape(place, [1, -1, 1, 1, 1]), end)
    later = ops.op(
        "Greater", ops.reshape(place, [1, -1]), ops.reshape(place, [-1, 1])
    )  # [T of the query, T of the key]
    is_prompt = ops.cast(
        ops.op(
            "Less",
            ops.cast(ops.reshape(place, [1, -1]), "int32"),
            ops.reshape(prompt_length, [-1, 1]),
        ),
        "float32",
    )  # [B, T]
    hidden = embeds if writer.dtype == "float32" else ops.cast(embeds, writer.dtype)
    hidden = project_condition(writer, hidden)
    outputs: dict[str, ir.Value] = {}
    for layer in range(config.num_layers):
        normed = rms_norm(writer, hidden, norm_name(layer))
        queries, keys, values = heads_of(writer, normed, layer, cos, sin, leading=(0, 0))
        attended = []
        for index, group in enumerate(writer.table.layers[layer]):
            key, value = (
                ops.op("Transpose", part[index], perm=[0, 2, 1, 3]) for part in (keys, values)
            )
            out, probs = causal_attention(writer, queries[index], key, value, later, group)
            attended.append(out)
            for part, rows in (("key", key), ("value", value)):
                if writer.table.kv_dtype == "int8":
                    rows, scale = quantize_rows(ops, rows, writer.dtype)
                    outputs[CacheTensor(layer, index, f"{part}_scale").present] = scale
                elif writer.bundle_dtype != writer.dtype:
                    rows = ops.cast(rows, writer.bundle_dtype)
                outputs[CacheTensor(layer, index, part).present] = rows
            if group.rule.by_score:
                outputs[CacheTensor(layer, index, "score").present] = prompt_scores(
                    ops, probs, is_prompt
                )
        merged = attended[0] if len(attended) == 1 else ops.op("Concat", *attended, axis=2)
        hidden = after_attention(writer, hidden, ops.reshape(merged, [0, 0, -1]), layer)
    last = ops.op("Sub", prompt_length, ops.constant([1], "int32"))
    hidden = ops.op("GatherND", hidden, ops.reshape(ops.cast(last, "int64"), [-1, 1]), batch_dims=1)
    logits = image_logits(writer, rms_norm(writer, hidden, FINAL_NORM))
    outputs |= {
        "token": draw(writer, logits, ops.constant([0]), inputs),
        "logits": logits,
    }
    return spec, writer.model(spec, inputs, outputs)


def write_evict(writer: GraphWriter, spec: GraphSpec) -> tuple[GraphSpec, ir.Model]:
    """Evicts evict_every tokens in every head that has no empty slot, for the groups in the
    spec.
    """
    ops = writer.ops
    inputs = graph_inputs(spec)
    past = ops.cast(ops.op("Sub", inputs["step"], ops.constant([1])), "int32")
    position = ops.op("Add", inputs["prompt_length"], past)
    outputs: dict[str, ir.Value] = {}
    for layer, index, group in head_groups(writer.table):
        if CacheTensor(layer, index, "position").past not in inputs:
            continue
        node = writer.attention_node(group)
        score = inputs.get(CacheTensor(layer, index, "score").past)
        evicted, scaled = eviction_nodes(
            ops,
            node,
            position,
            inputs["prompt_length"],
            inputs[CacheTensor(layer, index, "position").past],
            score,
        )
        outputs[CacheTensor(layer, index, "position").present] = evicted
        if scaled is not None:
            outputs[CacheTensor(layer, index, "score").present] = scaled
    kept = {tensor.name for tensor in spec.outputs}
    return spec, writer.model(
        spec, inputs, {name: value for name, value in outputs.items() if name in kept}
    )


def draw(
    writer: GraphWriter, logits: ir.Value, step: ir.Value, inputs: dict[str, ir.Value]
) -> ir.Value:
    """The tokens of a step, int32 [N]."""
    if "top_k" in inputs:
        inputs = inputs | {NUM_SORTED_CODES: writer.num_sorted_codes()}
    noise = noise_of_step(writer.ops, inputs["noise"], step)
    return draw_tokens(writer.ops, writer.config, logits, noise, inputs)


class AttentionFunctions:
    """One local function for every different head group; `DecodeAttention_0`, `_1`, ..."""

    def __init__(self) -> None:
        self._names: dict[AttentionNode, str] = {}

    def call(self, ops: Operators, node: AttentionNode, *inputs: ir.Value) -> list[ir.Value]:
        """Adds a node that calls the function of its parameters: output, then the cache's
        tensors.
        """
        name = self._names.setdefault(node, f"{OP_TYPE}_{len(self._names)}")
        num_outputs = 1 + len(graphs.part_names(node.rule, node.kv_dtype))
        return ops.many(name, *inputs, domain=DOMAIN, num_outputs=num_outputs, **node.attributes())

    def all(self, opset: int) -> list[ir.Function]:
        """The functions that were called, each once."""
        return [attention_function(node, name, opset) for node, name in self._names.items()]


def rms_norm(writer: GraphWriter, x: ir.Value, weight: str) -> ir.Value:
    """RMSNorm in the form that ONNX Runtime fuses to one SimplifiedLayerNormalization."""
    ops = writer.ops
    wide = x if writer.dtype == "float32" else ops.cast(x, "float32")
    square = ops.op("Pow", wide, ops.constant(2.0, "float32"))
    mean = ops.op("ReduceMean", square, ops.constant([-1]), keepdims=1)
    root = ops.op("Sqrt", ops.op("Add", mean, ops.constant(writer.config.rms_norm_eps, "float32")))
    normed = ops.op("Div", wide, root)
    normed = normed if writer.dtype == "float32" else ops.cast(normed, writer.dtype)
    return ops.op("Mul", normed, writer.weight(weight))


def rope_tables(
    writer: GraphWriter, position: ir.Value, prompt_length: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """cos and sin [..., heads, 2, D/2] of positions [..., 1, 1, 1], for query, key and value heads
    as a row of q, k, v has them: 1 and 0 for values, which are not turned; sin carries the signs of
    the rotation. With a grid, both are 0 for queries and keys of the condition.

    Args: prompt_length int32 [..., 1, 1, 1]: what a grid's image tokens come after.

    Written out for every head, once a step: a product of equal shapes is one loop, where ONNX
    Runtime goes over a broadcast in pieces of D/2 numbers (2 to 4 times longer, twice a layer).
    """
    config, ops = writer.config, writer.ops
    turned = np.repeat([1.0, 0.0], [config.num_heads + config.num_kv_heads, config.num_kv_heads])[
        :, None, None
    ]
    cos, sin = rope_angles(writer, position, prompt_length)
    cos = ops.op("Mul", cos, ops.constant(turned * [[1.0], [1.0]], "float32"))
    cos = ops.op("Add", cos, ops.constant(1 - turned, "float32"))
    sin = ops.op("Mul", sin, ops.constant(turned * [[-1.0], [1.0]], "float32"))
    if writer.dtype == "float32":
        return cos, sin
    return ops.cast(cos, writer.dtype), ops.cast(sin, writer.dtype)


def rope_angles(
    writer: GraphWriter, position: ir.Value, prompt_length: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """cos and sin float32 [..., 1, 1, D/2] of positions; arguments as those of rope_tables."""
    config, ops = writer.config, writer.ops
    # torch's own float32 numbers: at position 600 one unit in the last place of a frequency moves
    # tokens
    frequencies = [ops.constant(own, "float32") for own in rope_of(config).frequencies.numpy()]
    visible = None
    if config.rope_axes == 1:
        angles = ops.op("Mul", ops.cast(position, "float32"), frequencies[0])
    else:
        index = ops.op("Sub", ops.cast(position, "int32"), prompt_length)
        width = ops.constant(config.grid.width, "int32")
        places = ops.op("Div", index, width), ops.op("Mod", index, width)
        angles = ops.op(
            "Add",
            *(
                ops.op("Mul", ops.cast(place, "float32"), own)
                for place, own in zip(places, frequencies, strict=True)
            ),
        )
        is_image = ops.op("GreaterOrEqual", index, ops.constant(0, "int32"))
        visible = ops.cast(is_image, "float32")
    cos, sin = ops.op("Cos", angles), ops.op("Sin", angles)
    if visible is None:
        return cos, sin
    return ops.op("Mul", cos, visible), ops.op("Mul", sin, visible)


def heads_of(
    writer: GraphWriter,
    normed: ir.Value,
    layer: int,
    cos: ir.Value,
    sin: ir.Value,
    leading: tuple[int, ...] = (0,),
    heads_first: bool = False,
) -> tuple[list[ir.Value], list[ir.Value], list[ir.Value]]:
    """Queries, keys (both turned by RoPE) and values of each head group: [*leading, heads, D],
    leading as in normed, or [B, heads, T, D] with heads_first.
    """
    config, ops = writer.config, writer.ops
    groups, num_heads = writer.table.layers[layer], config.num_heads + 2 * config.num_kv_heads
    pairs = ops.reshape(
        writer.linear(normed, f"layers.{layer}.qkv"), [*leading, num_heads, 2, config.head_dim // 2]
    )
    swapped = ops.op("Gather", pairs, ops.constant([1, 0]), axis=-2)
    pairs = ops.op("Add", ops.op("Mul", pairs, cos), ops.op("Mul", swapped, sin))
    heads = ops.reshape(pairs, [*leading, num_heads, config.head_dim])
    num_kv = [group.num_heads for group in groups]
    num_query = [part.stop - part.start for part in query_slices(groups, config.query_group_size)]
    if heads_first:
        heads = ops.op("Transpose", heads, perm=[0, 2, 1, 3])
    axis = 1 if heads_first else -2
    parts = ops.split(heads, num_query + num_kv + num_kv, axis=axis)
    count = len(groups)
    return parts[:count], parts[count : 2 * count], parts[2 * count :]


def causal_attention(
    writer: GraphWriter,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    later: ir.Value,
    group: HeadGroup,
) -> tuple[ir.Value, ir.Value]:
    """query [B, T, H*G, D], key, value [B, H, T, D] -> out [B, T, H*G, D], probs float32 [B, H, G,
    T, T].
    """
    config, ops = writer.config, writer.ops
    size = config.query_group_size
    query = ops.op("Transpose", query, perm=[0, 2, 1, 3])
    query = ops.op("Mul", query, ops.constant(config.head_dim**-0.5, writer.dtype))
    query = ops.op(
        "Reshape",
        query,
        ops.op(
            "Concat",
            ops.constant([0, group.num_heads, size]),
            ops.op("Shape", key, start=2, end=4),
            axis=0,
        ),
    )
    across = ops.op("Unsqueeze", ops.op("Transpose", key, perm=[0, 1, 3, 2]), ops.constant([2]))
    logits = ops.op("MatMul", query, across)
    if writer.dtype != "float32":
        logits = ops.cast(logits, "float32")
    probs = ops.op(
        "Softmax", ops.op("Where", later, ops.constant(MASKED, "float32"), logits), axis=-1
    )
    weights = probs if writer.dtype == "float32" else ops.cast(probs, writer.dtype)
    out = ops.op(
        "MatMul", weights, ops.op("Unsqueeze", value, ops.constant([2]))
    )  # [B, H, G, T, D]
    out = ops.op("Transpose", out, perm=[0, 3, 1, 2, 4])
    return ops.reshape(out, [0, 0, group.num_heads * size, config.head_dim]), probs


def prompt_scores(ops: Operators, probs: ir.Value, is_prompt: ir.Value) -> ir.Value:
    """Attention that prompt tokens received from each other, float32 [B, H, T] (R2), without
    padding.
    """
    given = ops.op("Mul", probs, ops.op("Unsqueeze", is_prompt, ops.constant([1, 2, 4])))
    return ops.op("ReduceSum", given, ops.constant([2, 3]), keepdims=0)


def norm_name(layer: int) -> str:
    """The weight of the RMSNorm that a layer begins with."""
    return f"language_model.layers.{layer}.input_layernorm.weight"


def after_attention(
    writer: GraphWriter, hidden: ir.Value, attended: ir.Value, layer: int
) -> ir.Value:
    """Output projection and MLP, each added to the residual stream."""
    ops, source = writer.ops, f"language_model.layers.{layer}"
    hidden = ops.op("Add", hidden, writer.linear(attended, f"layers.{layer}.o"))
    normed = rms_norm(writer, hidden, f"{source}.post_attention_layernorm.weight")
    return ops.op("Add", hidden, mlp(writer, normed, layer))


def mlp(writer: GraphWriter, normed: ir.Value, layer: int) -> ir.Value:
    """down(silu(gate) * up) of a layer."""
    ops, size = writer.ops, writer.config.intermediate_size
    gate_up = writer.linear(normed, f"layers.{layer}.gate_up")
    if writer.uses_operators:
        gated = ops.many("GatedSilu", gate_up, domain=DOMAIN, num_outputs=1)[0]
    else:
        gate, up = ops.split(gate_up, [size, size], axis=-1)
        gated = ops.op("Mul", ops.op("Mul", gate, ops.op("Sigmoid", gate)), up)
    return writer.linear(gated, f"layers.{layer}.down")


def gelu(writer: GraphWriter, x: ir.Value) -> ir.Value:
    """The exact form, x / 2 (1 + erf(x / sqrt 2))."""
    ops, dtype = writer.ops, writer.dtype
    error = ops.op("Erf", ops.op("Div", x, ops.constant(2**0.5, dtype)))
    return ops.op(
        "Mul",
        ops.op("Mul", x, ops.op("Add", error, ops.constant(1.0, dtype))),
        ops.constant(0.5, dtype),
    )


def gelu_tanh(writer: GraphWriter, x: ir.Value) -> ir.Value:
    """The approximation by tanh, in float32: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    ops = writer.ops
    wide = x if writer.dtype == "float32" else ops.cast(x, "float32")
    cube = ops.op("Mul", ops.op("Mul", wide, wide), wide)
    inner = ops.op("Add", wide, ops.op("Mul", cube, ops.constant(0.044715, "float32")))
    inner = ops.op("Tanh", ops.op("Mul", inner, ops.constant((2 / np.pi) ** 0.5, "float32")))
    half = ops.op("Mul", wide, ops.constant(0.5, "float32"))
    out = ops.op("Mul", half, ops.op("Add", inner, ops.constant(1.0, "float32")))
    return out if writer.dtype == "float32" else ops.cast(out, writer.dtype)


def project_condition(writer: GraphWriter, embeds: ir.Value) -> ir.Value:
    """The condition's embeddings [..., condition_dim] -> hidden states [..., hidden_size]."""
    if not writer.config.caption_dim:
        return embeds
    inner = gelu_tanh(writer, writer.linear(embeds, "caption_projection.fc1"))
    return writer.linear(inner, "caption_projection.fc2")


def embed_image_token(writer: GraphWriter, token: ir.Value) -> ir.Value:
    """Image tokens [N] -> the decoder's input [N, hidden_size]."""
    code = writer.ops.op("Gather", writer.weight("generation_embeddings.weight"), token, axis=0)
    if not writer.config.has_aligner:
        return code
    inner = gelu(writer, writer.linear(code, "generation_aligner.fc1", bias=True))
    return writer.linear(inner, "generation_aligner.hidden_layers.0", bias=True)


def image_logits(writer: GraphWriter, normed: ir.Value) -> ir.Value:
    """float32 [B, V] from hidden states [B, hidden_size] after the final norm."""
    has_mlp = writer.config.has_aligner
    if has_mlp:
        normed = gelu(writer, writer.linear(normed, "generation_head.proj_out", bias=True))
    logits = writer.linear(normed, "generation_head.vision_head", bias=has_mlp)
    return logits if writer.dtype == "float32" else writer.ops.cast(logits, "float32")
