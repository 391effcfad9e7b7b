"""Guidance and sampling inside the graph, so that a step's token is the next step's input without a
host between.

guided = u + cfg_scale (c - u); token = arg-max over the codebook of guided + temperature x noise,
the lowest code of equal ones: an exact draw from softmax(guided / temperature), and with
temperature 0 the greedy choice (noise.py, whose race is divided by the temperature). With top-k
only codes whose guided logit is at least the k-th greatest take part. All float32.
`ssd_export/runtime/torch_runner.py` computes the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ssd_export.bundle.graphs import num_sorted_codes
from ssd_export.config import ModelConfig
from ssd_export.export.operators import Operators
from ssd_export.graph_spec import NUM_SORTED_CODES

OUT_OF_THE_RACE = -3.0e38


def draw_tokens(
    ops: Operators,
    config: ModelConfig,
    logits: ir.Value,
    noise: ir.Value,
    inputs: dict[str, ir.Value],
) -> ir.Value:
    """int32 [N] from logits float32 [2 N, V], or [N, V] without guidance, and noise float32 [N, V].

    `inputs` holds cfg_scale and temperature float32 [N] and, in the graphs with top-k, top_k int64
    [N] (0: every code) and the number of codes to sort, at least the greatest of top_k.
    """
    guided, codebook_size = logits, config.codebook_size
    if config.rows_per_image == 2:
        guided = _guided(ops, codebook_size, logits, inputs["cfg_scale"])
    temperature = ops.reshape(inputs["temperature"], [-1, 1])
    race = ops.op("Add", guided, ops.op("Mul", temperature, noise))
    if "top_k" in inputs:
        in_race = _top_k(ops, codebook_size, guided, inputs["top_k"], inputs[NUM_SORTED_CODES])
        race = ops.op("Where", in_race, race, ops.constant(OUT_OF_THE_RACE, "float32"))
    return ops.cast(ops.op("ArgMax", race, axis=-1, keepdims=0), "int32")


def noise_of_step(ops: Operators, noise: ir.Value, step: ir.Value) -> ir.Value:
    """float32 [N, V] of step int64 [1]; noise [rows, N, V] holds the noise of step s in row s mod
    rows."""
    shape = noise.shape
    assert shape is not None
    row = ops.op("Mod", step, ops.constant([shape[0]]))
    return ops.op("Squeeze", ops.op("Gather", noise, row, axis=0), ops.constant([0]))


def _guided(ops: Operators, codebook_size: int, logits: ir.Value, cfg_scale: ir.Value) -> ir.Value:
    halves = ops.reshape(logits, [2, -1, codebook_size])
    conditional, unconditional = (
        ops.reshape(half, [-1, codebook_size]) for half in ops.split(halves, [1, 1], axis=0)
    )
    difference = ops.op("Sub", conditional, unconditional)
    scale = ops.reshape(cfg_scale, [-1, 1])
    return ops.op("Add", unconditional, ops.op("Mul", scale, difference))


def num_sorted_input(codebook_size: int) -> ir.Value:
    """The number of codes that TopK sorts, int64 [1]: an input with a default value.

    ONNX Runtime is given the greatest top-k of the batch. TensorRT, whose TopK wants a constant,
    reads the default as one.
    """
    default = ir.tensor(
        np.array([num_sorted_codes(codebook_size)], np.int64), name=NUM_SORTED_CODES
    )
    return ir.Value(
        name=NUM_SORTED_CODES,
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=default,
    )


def _top_k(
    ops: Operators, codebook_size: int, guided: ir.Value, top_k: ir.Value, num_sorted: ir.Value
) -> ir.Value:
    """bool [N, V]: whether the guided logit is at least the image's k-th greatest."""
    one, zero = ops.constant([1]), ops.constant([0])
    wanted = ops.op("Min", top_k, ops.constant([codebook_size]))
    sorted_logits, _ = ops.many("TopK", guided, num_sorted, num_outputs=2, axis=-1)
    place = ops.reshape(ops.op("Max", ops.op("Sub", wanted, one), zero), [-1, 1])
    threshold = ops.op("GatherElements", sorted_logits, place, axis=1)  # [N, 1]
    unlimited = ops.op("Equal", ops.reshape(top_k, [-1, 1]), zero)
    return ops.op("Or", ops.op("GreaterOrEqual", guided, threshold), unlimited)
