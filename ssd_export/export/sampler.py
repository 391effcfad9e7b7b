"""Guidance and sampling inside the graph, so that a step's token is the next step's input without a
host between.

guided = u + cfg_scale (c - u); p = softmax(guided / temperature), after an optional top-k; the
token is the inverse-CDF sample of one given uniform number: how many entries of the running sum of
p are <= uniform x total. Temperature 0 is greedy: the arg-max of guided. All float32.

The running sum is two triangular matrix products (inside blocks of 128, then over blocks) instead
of CumSum, which older TensorRT parsers unroll into a slow loop.
`ssd_export/runtime/torch_runner.py` computes the same sums.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import onnx_ir as ir

from ssd_export.export.operators import Operators

BLOCK = 128
MAX_TOP_K = 2048
LEAST_TEMPERATURE = 1e-6


def draw_tokens(
    ops: Operators,
    codebook_size: int,
    logits: ir.Value,
    step: ir.Value,
    inputs: dict[str, ir.Value],
) -> ir.Value:
    """int32 [N] from logits float32 [2 N, V]; step int64 [1] chooses the row of `uniforms` [I,
    N], I being the number of image tokens.

    `inputs` holds uniforms, cfg_scale, temperature and, in the graphs with top-k, top_k.
    """
    guided = _guided(ops, codebook_size, logits, inputs["cfg_scale"])
    temperature = ops.op("Max", inputs["temperature"], ops.constant([LEAST_TEMPERATURE], "float32"))
    scaled = ops.op("Div", guided, temperature)
    if "top_k" in inputs:
        scaled = _keep_top_k(ops, codebook_size, scaled, inputs["top_k"])
    uniform = ops.reshape(ops.op("Gather", inputs["uniforms"], step, axis=0), [-1, 1])
    sampled = _inverse_cdf(ops, codebook_size, ops.op("Softmax", scaled, axis=-1), uniform)
    greedy = ops.cast(ops.op("ArgMax", guided, axis=-1, keepdims=0), "int32")
    is_greedy = ops.op("Equal", inputs["temperature"], ops.constant([0.0], "float32"))
    return ops.op("Where", is_greedy, greedy, sampled)


def _guided(ops: Operators, codebook_size: int, logits: ir.Value, cfg_scale: ir.Value) -> ir.Value:
    halves = ops.reshape(logits, [2, -1, codebook_size])
    conditional, unconditional = (
        ops.reshape(half, [-1, codebook_size]) for half in ops.split(halves, [1, 1], axis=0)
    )
    difference = ops.op("Sub", conditional, unconditional)
    return ops.op("Add", unconditional, ops.op("Mul", cfg_scale, difference))


def _keep_top_k(ops: Operators, codebook_size: int, scaled: ir.Value, top_k: ir.Value) -> ir.Value:
    """Logits below the k-th greatest masked; k is at most MAX_TOP_K (TensorRT's TopK ends at
    3840).
    """
    count = min(MAX_TOP_K, codebook_size)
    values, _ = ops.many("TopK", scaled, ops.constant([count]), num_outputs=2, axis=-1)
    place = ops.op("Sub", ops.op("Min", top_k, ops.constant([count])), ops.constant([1]))
    threshold = ops.op("Gather", values, place, axis=1)  # [N, 1]
    return ops.op(
        "Where", ops.op("Less", scaled, threshold), ops.constant(-3.0e38, "float32"), scaled
    )


def _inverse_cdf(
    ops: Operators, codebook_size: int, probs: ir.Value, uniform: ir.Value
) -> ir.Value:
    """int32 [N] from probs [N, V] and uniform [N, 1]."""
    num_blocks = ceil(codebook_size / BLOCK)
    padding = num_blocks * BLOCK - codebook_size
    padded = ops.op("Pad", probs, ops.constant([0, 0, 0, padding])) if padding else probs
    blocks = ops.reshape(padded, [-1, num_blocks, BLOCK])
    upto = ops.constant(np.triu(np.ones((BLOCK, BLOCK))), "float32")
    inside = ops.op("MatMul", blocks, upto)  # [N, blocks, BLOCK]
    sums = ops.reshape(
        ops.op("Gather", inside, ops.constant([BLOCK - 1]), axis=2), [-1, num_blocks]
    )
    before = ops.constant(np.triu(np.ones((num_blocks, num_blocks)), 1), "float32")
    offsets = ops.reshape(ops.op("MatMul", sums, before), [-1, num_blocks, 1])
    cdf = ops.reshape(ops.op("Add", inside, offsets), [-1, num_blocks * BLOCK])
    total = ops.op("ReduceSum", sums, ops.constant([1]), keepdims=1)
    passed = ops.op("LessOrEqual", cdf, ops.op("Mul", uniform, total))
    count = ops.op("ReduceSum", ops.cast(passed, "int32"), ops.constant([1]), keepdims=0)
    return ops.op("Min", count, ops.constant(codebook_size - 1, "int32"))
