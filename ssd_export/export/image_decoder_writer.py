"""Writes the VQ-16 image decoder as an ONNX graph: codes of the grid -> pixels in 0..255.

Operation for operation ssd_export/model/image_decoder.py, the torch reference; GroupNorm and
softmax in float32.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from ssd_export.bundle.graphs import image_decoder_spec
from ssd_export.config import NUM_GROUPS, ModelConfig
from ssd_export.export.onnx_writer import GraphWriter, graph_inputs
from ssd_export.export.operators import Operators
from ssd_export.graph_spec import GraphSpec
from ssd_export.model.image_decoder import EPS


class DecoderWriter(Protocol):
    """The part of a GraphWriter that these functions use; the writer of int8 has it too."""

    config: ModelConfig
    ops: Operators
    dtype: str

    def weight(self, name: str) -> ir.Value:
        """The initializer of a tensor of the checkpoint."""


def write_image_decoder(writer: GraphWriter) -> tuple[GraphSpec, ir.Model]:
    """The image decoder as a graph, with its contract."""
    ops, vq, root = writer.ops, writer.config.vq, "vqmodel.decoder"
    spec = image_decoder_spec(writer.config)
    inputs = graph_inputs(spec)
    widths = [vq.base_channels * multiplier for multiplier in reversed(vq.channel_multipliers)]
    x = decoder_latents(writer, inputs["codes"])
    x = conv(writer, x, f"{root}.conv_in", padding=1)
    x = _residual(writer, x, f"{root}.mid.block_1", widths[0], widths[0])
    x = attention(writer, x, f"{root}.mid.attn_1", widths[0])
    x = _residual(writer, x, f"{root}.mid.block_2", widths[0], widths[0])
    channels = widths[0]
    for level, width in enumerate(widths):
        for block in range(vq.num_res_blocks + 1):
            x = _residual(writer, x, f"{root}.up.{level}.block.{block}", channels, width)
            channels = width
            if level == 0:
                x = attention(writer, x, f"{root}.up.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            x = ops.op(
                "Resize",
                x,
                None,
                ops.constant([1.0, 1.0, 2.0, 2.0], "float32"),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
            x = conv(writer, x, f"{root}.up.{level}.upsample.conv", padding=1)
    x = _swish(writer, _group_norm(writer, x, f"{root}.norm_out"))
    x = conv(writer, x, f"{root}.conv_out", padding=1)
    return spec, writer.model(spec, inputs, {"pixels": decoder_pixels(writer, x)})


def decoder_latents(writer: DecoderWriter, codes: ir.Value) -> ir.Value:
    """Unit vectors of the codebook, [N, codebook_dim, height, width], through the 1x1
    convolution.
    """
    ops = writer.ops
    entries = ops.op("Gather", writer.weight("vqmodel.quantize.embedding.weight"), codes, axis=0)
    wide = entries if writer.dtype == "float32" else ops.cast(entries, "float32")
    length = ops.op(
        "Max", ops.op("ReduceL2", wide, ops.constant([-1])), ops.constant(1e-12, "float32")
    )
    unit = ops.op("Div", wide, length)
    unit = unit if writer.dtype == "float32" else ops.cast(unit, writer.dtype)
    grid = writer.config.grid
    latents = ops.op("Transpose", unit, perm=[0, 2, 1])
    latents = ops.reshape(latents, [0, writer.config.codebook_dim, grid.height, grid.width])
    return conv(writer, latents, "vqmodel.post_quant_conv", padding=0)


def conv(writer: DecoderWriter, x: ir.Value, name: str, padding: int) -> ir.Value:
    """A convolution with its bias."""
    return writer.ops.op(
        "Conv",
        x,
        writer.weight(f"{name}.weight"),
        writer.weight(f"{name}.bias"),
        pads=[padding] * 4,
    )


def _swish(writer: DecoderWriter, x: ir.Value) -> ir.Value:
    return writer.ops.op("Mul", x, writer.ops.op("Sigmoid", x))


def _group_norm(writer: DecoderWriter, x: ir.Value, name: str) -> ir.Value:
    """Writes GroupNorm as InstanceNormalization of 32 long rows, then scale and shift by
    channel.
    """
    ops, full = writer.ops, writer.dtype == "float32"
    wide = x if full else ops.cast(x, "float32")
    rows = ops.reshape(wide, [0, NUM_GROUPS, -1])
    ones, zeros = (
        ops.constant([1.0] * NUM_GROUPS, "float32"),
        ops.constant([0.0] * NUM_GROUPS, "float32"),
    )
    normed = ops.op("InstanceNormalization", rows, ones, zeros, epsilon=EPS)
    normed = ops.op("Reshape", normed, ops.op("Shape", wide))
    scale, shift = (
        ops.reshape(writer.weight(f"{name}.{part}"), [1, -1, 1, 1]) for part in ("weight", "bias")
    )
    if not full:
        scale, shift = ops.cast(scale, "float32"), ops.cast(shift, "float32")
    scaled = ops.op("Add", ops.op("Mul", normed, scale), shift)
    return scaled if full else ops.cast(scaled, writer.dtype)


def _residual(
    writer: GraphWriter, x: ir.Value, name: str, channels_in: int, channels_out: int
) -> ir.Value:
    changed = _swish(writer, _group_norm(writer, x, f"{name}.norm1"))
    changed = conv(writer, changed, f"{name}.conv1", padding=1)
    changed = _swish(writer, _group_norm(writer, changed, f"{name}.norm2"))
    changed = conv(writer, changed, f"{name}.conv2", padding=1)
    if channels_in != channels_out:
        x = conv(writer, x, f"{name}.nin_shortcut", padding=0)
    return writer.ops.op("Add", x, changed)


def attention(writer: DecoderWriter, x: ir.Value, name: str, channels: int) -> ir.Value:
    """Single-head attention among the places of the grid."""
    ops, grid = writer.ops, writer.config.grid
    normed = _group_norm(writer, x, f"{name}.norm")
    query, key, value = (
        ops.reshape(conv(writer, normed, f"{name}.{part}", padding=0), [0, channels, -1])
        for part in "qkv"
    )
    logits = ops.op("MatMul", ops.op("Transpose", query, perm=[0, 2, 1]), key)
    logits = ops.op("Mul", logits, ops.constant(channels**-0.5, writer.dtype))
    if writer.dtype != "float32":
        logits = ops.cast(logits, "float32")
    weights = ops.op("Softmax", logits, axis=-1)
    if writer.dtype != "float32":
        weights = ops.cast(weights, writer.dtype)
    attended = ops.op("MatMul", value, ops.op("Transpose", weights, perm=[0, 2, 1]))
    attended = ops.reshape(attended, [0, channels, grid.height, grid.width])
    return ops.op("Add", x, conv(writer, attended, f"{name}.proj_out", padding=0))


def decoder_pixels(writer: DecoderWriter, x: ir.Value) -> ir.Value:
    """-1..1 -> 0..255, clipped, channels last, float32; the runtime truncates to uint8 as Janus
    does.
    """
    ops = writer.ops
    wide = x if writer.dtype == "float32" else ops.cast(x, "float32")
    half = ops.op(
        "Div", ops.op("Add", wide, ops.constant(1.0, "float32")), ops.constant(2.0, "float32")
    )
    scaled = ops.op("Mul", half, ops.constant(255.0, "float32"))
    clipped = ops.op("Clip", scaled, ops.constant(0.0, "float32"), ops.constant(255.0, "float32"))
    return ops.op("Transpose", clipped, perm=[0, 2, 3, 1])
