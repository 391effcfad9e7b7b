"""Writes decode_window: several steps of each image in one pass, the caches left as single steps
would leave them; and decode_rows: steps of several grid rows.

One graph, run once a pass: what is sampled is compared with the drafts in the graph, so that it
settles the caches itself. The number of places is a dimension of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from ssd_export.bundle import graphs
from ssd_export.export.onnx_writer import (
    FINAL_NORM,
    GraphWriter,
    after_attention,
    embed_image_token,
    graph_inputs,
    heads_of,
    image_logits,
    rms_norm,
    rope_tables,
)
from ssd_export.export.operators import Operators
from ssd_export.export.sampler import draw_tokens
from ssd_export.export.window_attention import (
    AttendedGroup,
    Places,
    WindowPlaces,
    attend_rows,
    attend_window,
    settle_window,
)
from ssd_export.graph_spec import NUM_SORTED_CODES, CacheTensor, GraphSpec

SAMPLING_INPUTS: tuple[str, ...] = ("cfg_scale", "temperature", "top_k")
Inputs = dict[str, ir.Value]


def write_decode_window(writer: GraphWriter, top_k: bool = False) -> tuple[GraphSpec, ir.Model]:
    """A pass over the window of each image: samples, how many count, every cache in place."""
    ops = writer.ops
    spec = graphs.decode_window_spec(writer.config, writer.table, writer.bundle_dtype, top_k)
    inputs = graph_inputs(spec)
    places, tokens = _places(writer, inputs)
    one = embed_image_token(writer, tokens)
    attended: dict[tuple[int, int], AttendedGroup] = {}

    def attend(layer: int, index: int, *values: Any) -> ir.Value:
        out, attended[layer, index] = attend_window(ops, values[0], places, *values[1:])
        return out

    hidden = _through_layers(writer, inputs, _of_rows(writer, one), places, attend)
    logits = image_logits(writer, rms_norm(writer, hidden, FINAL_NORM))
    sampled = _sample(writer, logits, inputs)
    counts = _counts(ops, inputs, places, tokens, sampled)  # bool [N, W]
    kept = ops.op("ReduceSum", ops.cast(counts, "int64"), ops.constant([1]), keepdims=0)
    outputs = {"sampled": sampled, "kept": kept, "logits": logits}
    last = ops.op("Add", places.newest, _of_each_row(writer, ops.cast(kept, "int32")))
    of_queries = _of_rows(writer, ops.cast(counts, "float32"))
    for (layer, index), one_group in attended.items():
        present = settle_window(ops, one_group, places, last, of_queries)
        outputs |= {CacheTensor(layer, index, part).present: v for part, v in present.items()}
    return spec, writer.model(spec, inputs, outputs)


def write_decode_rows(writer: GraphWriter, top_k: bool = False) -> tuple[GraphSpec, ir.Model]:
    """A pass over places in several grid rows of each image: samples, every cache in place."""
    ops = writer.ops
    spec = graphs.decode_rows_spec(writer.config, writer.table, writer.bundle_dtype, top_k)
    inputs = graph_inputs(spec)
    lengths, steps = inputs["prompt_length"], inputs["steps"]
    before = ops.cast(ops.op("Sub", steps, ops.constant([1])), "int32")  # of the token given
    position = ops.reshape(ops.op("Add", ops.reshape(lengths, [-1, 1]), before), [0, 1, -1, 1])
    places = Places(position=position, prompt_length=lengths, steps=steps)
    one = embed_image_token(writer, inputs["window_tokens"])
    presents: dict[tuple[int, int], dict[str, ir.Value]] = {}

    def attend(layer: int, index: int, *values: Any) -> ir.Value:
        out, presents[layer, index] = attend_rows(ops, values[0], places, *values[1:])
        return out

    hidden = _through_layers(writer, inputs, _of_rows(writer, one), places, attend)
    logits = image_logits(writer, rms_norm(writer, hidden, FINAL_NORM))
    outputs = {"sampled": _sample(writer, logits, inputs), "logits": logits}
    for (layer, index), present in presents.items():
        outputs |= {CacheTensor(layer, index, part).present: v for part, v in present.items()}
    return spec, writer.model(spec, inputs, outputs)


def _through_layers(
    writer: GraphWriter,
    inputs: Inputs,
    hidden: ir.Value,
    places: Places,
    attend: Callable[..., ir.Value],
) -> ir.Value:
    """hidden [B, W, hidden] after every layer. attend: of (layer, group index, its node, query
    [B, H G, W, D], key, value [B, H, W, D], past by part), gives the heads' outputs.
    """
    ops, config = writer.ops, writer.config
    cos, sin = rope_tables(
        writer,
        ops.reshape(places.position, [0, -1, 1, 1, 1]),
        ops.reshape(places.prompt_length, [-1, 1, 1, 1, 1]),
    )
    for layer in range(config.num_layers):
        normed = rms_norm(writer, hidden, f"language_model.layers.{layer}.input_layernorm.weight")
        queries, keys, values = heads_of(
            writer, normed, layer, cos, sin, leading=(0, 0), heads_first=True
        )
        outs = []
        for index, group in enumerate(writer.table.layers[layer]):
            node = writer.attention_node(group)
            parts = graphs.part_names(group.rule, writer.table.kv_dtype)
            past = {part: inputs[CacheTensor(layer, index, part).past] for part in parts}
            token = queries[index], keys[index], values[index]
            outs.append(attend(layer, index, node, *token, past))
        merged = outs[0] if len(outs) == 1 else ops.op("Concat", *outs, axis=1)
        merged = ops.reshape(ops.op("Transpose", merged, perm=[0, 2, 1, 3]), [0, 0, -1])
        hidden = after_attention(writer, hidden, merged, layer)
    return hidden


def _places(writer: GraphWriter, inputs: Inputs) -> tuple[WindowPlaces, ir.Value]:
    """(where each row is, int32 [N, W] the token of each place). Places from the limit on repeat
    the last one before it, so that they write the same into the same slot.
    """
    ops, one = writer.ops, writer.ops.constant([1])
    width = ops.op("Squeeze", ops.op("Shape", inputs["window_tokens"], start=1, end=2))
    steps = ops.op("Range", ops.constant(0), width, ops.constant(1))
    limit, first = (ops.reshape(inputs[name], [-1, 1]) for name in ("limit", "first"))
    place = ops.op("Min", steps, ops.op("Sub", limit, one))  # [N, W]; -1 where an image rests
    tokens = ops.op(
        "GatherElements", inputs["window_tokens"], ops.op("Max", place, ops.constant([0])), axis=1
    )
    prompt_length = inputs["prompt_length"]
    lengths = ops.reshape(prompt_length, [-1, 1])
    before = ops.op("Sub", ops.op("Add", first, place), one)
    position = ops.op("Add", lengths, _of_rows(writer, ops.cast(before, "int32")))
    position = ops.reshape(position, [0, 1, -1, 1])
    last_written = _of_each_row(
        writer, ops.cast(ops.op("Sub", inputs["first"], ops.constant([2])), "int32")
    )
    newest = ops.op("Add", ops.reshape(prompt_length, [-1, 1, 1]), last_written)
    rests = ops.op(
        "Less", _of_each_row(writer, ops.cast(inputs["limit"], "int32")), ops.constant(1, "int32")
    )
    return (
        WindowPlaces(
            position=position,
            newest=newest,
            rests=rests,
            prompt_length=prompt_length,
            steps=steps,
        ),
        tokens,
    )


def _of_rows(writer: GraphWriter, of_images: ir.Value) -> ir.Value:
    """[N, ...] as each row of an image has it, [B, ...]."""
    copies = [of_images] * writer.config.rows_per_image
    return writer.ops.op("Concat", *copies, axis=0) if len(copies) > 1 else of_images


def _of_each_row(writer: GraphWriter, of_images: ir.Value) -> ir.Value:
    """[N] as [B, 1, 1]."""
    return writer.ops.reshape(_of_rows(writer, of_images), [-1, 1, 1])


def _sample(writer: GraphWriter, logits: ir.Value, inputs: Inputs) -> ir.Value:
    """int32 [N, W] from logits [B, W, V]: each place is an image of its own to the sampler."""
    ops, codes = writer.ops, writer.config.codebook_size
    shape = ops.op("Shape", inputs["window_tokens"])
    of_places: Inputs = {}
    for name in SAMPLING_INPUTS:
        if name in inputs:
            spread = ops.op("Expand", ops.reshape(inputs[name], [-1, 1]), shape)
            of_places[name] = ops.reshape(spread, [-1])
    if "top_k" in inputs:
        of_places[NUM_SORTED_CODES] = writer.num_sorted_codes()
    noise = ops.reshape(inputs["noise"], [-1, codes])
    sampled = draw_tokens(
        ops, writer.config, ops.reshape(logits, [-1, codes]), noise, inputs | of_places
    )
    return ops.op("Reshape", sampled, shape)


def _counts(
    ops: Operators, inputs: Inputs, places: WindowPlaces, tokens: ir.Value, sampled: ir.Value
) -> ir.Value:
    """bool [N, W]: whether a place counts: within the limit, and all drafts before it were
    right.
    """
    end, start, axis = ops.constant([1 << 31]), ops.constant([1]), ops.constant([1])
    drafts = ops.op("Slice", tokens, start, end, axis)
    samples = ops.op("Slice", sampled, ops.constant([0]), ops.constant([-1]), axis)
    wrong = ops.cast(ops.op("Not", ops.op("Equal", drafts, samples)), "int32")
    none = ops.op(
        "Mul", ops.op("Slice", tokens, ops.constant([0]), start, axis), ops.constant(0, "int32")
    )
    wrong = ops.op("CumSum", ops.op("Concat", none, wrong, axis=1), ops.constant(1))
    right = ops.op("Equal", wrong, ops.constant(0, "int32"))
    return ops.op("And", right, ops.op("Less", places.steps, ops.reshape(inputs["limit"], [-1, 1])))
