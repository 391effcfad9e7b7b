"""Writes the image decoder in int8 over the operators of engines/operators, for runtimes that have
that library: everything is channels last, and one operator stands between two convolutions.

But for rounding the arithmetic is that of int8_decoder_writer.py, and the file of tensors is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ssd_export.config import NUM_GROUPS
from ssd_export.export.functions import DOMAIN
from ssd_export.export.int8_decoder_writer import Between, Int8Writer, Pending, Size, State
from ssd_export.export.int8_scales import InputScale
from ssd_export.model.image_decoder import EPS


class FusedInt8Writer(Int8Writer):
    """The recorder of one graph, whose stream is [N, H, W, C]."""

    def between(self, state: State, size: Size) -> Between:
        """What stands between two convolutions."""
        return Fused(self, state)

    def from_channels_first(self, x: ir.Value) -> ir.Value:
        """A float feature map [N, C, H, W] as the stream of this writer has it."""
        return self.ops.op("Transpose", x, perm=[0, 2, 3, 1])

    def shortcut(self, x: ir.Value, name: str) -> ir.Value:
        """A 1 x 1 convolution of the stream, in float32: a matrix product of its places."""
        weight = self.weight(f"{name}.weight")
        num_out, num_in = self.tensors[f"{name}.weight"].shape[:2]
        matrix = self.ops.op("Transpose", self.ops.reshape(weight, [num_out, num_in]), perm=[1, 0])
        product = self.ops.op("MatMul", x, matrix)
        return self.ops.op("Add", product, self.weight(f"{name}.bias"))

    def attention(self, state: State, name: str, size: Size) -> State:
        """The attention block of a state, in float32."""
        ops = self.ops
        normed, x = Fused(self, state).normed_stream(f"{name}.norm")
        query, key, value = (
            ops.reshape(self.shortcut(normed, f"{name}.{part}"), [0, size.places, size.channels])
            for part in "qkv"
        )
        logits = ops.op("MatMul", query, ops.op("Transpose", key, perm=[0, 2, 1]))
        logits = ops.op("Mul", logits, ops.constant(size.channels**-0.5, "float32"))
        attended = ops.op("MatMul", ops.op("Softmax", logits, axis=-1), value)
        attended = ops.reshape(attended, [0, size.height, size.width, size.channels])
        return ops.op("Add", x, self.shortcut(attended, f"{name}.proj_out")), None

    def undoubled(self, phases: ir.Value, size: Size) -> ir.Value:
        """The four phases of a doubling, float32 [N, 4 C, H, W], as the stream [N, 2 H, 2 W, C]."""
        split = self.ops.reshape(phases, [-1, 2, 2, size.channels, size.height, size.width])
        places = self.ops.op("Transpose", split, perm=[0, 4, 1, 5, 2, 3])
        return self.ops.reshape(places, [-1, 2 * size.height, 2 * size.width, size.channels])


@dataclass
class Fused:
    """The operator between two convolutions, ssd_export::ResidualNorm or its form for codes."""

    writer: FusedInt8Writer
    state: State

    def kept(self, norm: str, quantize_for: str) -> tuple[ir.Value, ir.Value]:
        """See Between."""
        return self._keep(norm, quantize_for, silu=1)

    def normed_stream(self, norm: str) -> tuple[ir.Value, ir.Value]:
        """GroupNorm of the sum, and the sum itself."""
        return self._keep(norm, "", silu=0)

    def normed(self, norm: str, quantize_for: str) -> ir.Value:
        """See Between."""
        return self._operator(1, norm, quantize_for, silu=1)[0]

    def normed_image(self, norm: str) -> ir.Value:
        """See Between."""
        return self._operator(1, norm, silu=1, channels_first=1)[0]

    def quantized(self, quantize_for: str) -> ir.Value:
        """See Between."""
        return self._operator(1, "", quantize_for)[0]

    def summed(self) -> ir.Value:
        """See Between."""
        x, pending = self.state
        if pending is None:
            assert x is not None
            return x
        return self._operator(1)[0]

    def summed_channels_first(self) -> ir.Value:
        """See Between."""
        return self._operator(1, channels_first=1)[0]

    def _keep(self, norm: str, quantize_for: str, silu: int) -> tuple[ir.Value, ir.Value]:
        x, pending = self.state
        if pending is None:
            assert x is not None
            return self._operator(1, norm, quantize_for, silu)[0], x
        result, x = self._operator(2, norm, quantize_for, silu)
        return result, x

    def _operator(
        self,
        num_outputs: int,
        norm: str = "",
        quantize_for: str = "",
        silu: int = 0,
        channels_first: int = 0,
    ) -> list[ir.Value]:
        writer, (x, pending) = self.writer, self.state
        inputs = [x, *self._codes(pending)]
        inputs += [writer.weight(f"{norm}.{part}") if norm else None for part in ("weight", "bias")]
        op_type, zero_point = "ResidualNorm", 0
        if quantize_for:
            into = InputScale.of(writer.ranges[quantize_for])
            op_type, zero_point = "ResidualNormQuantize", into.zero_point
            inputs.append(writer.ops.constant(into.scale, "float32"))
        return writer.ops.many(
            op_type,
            *inputs,
            num_outputs=num_outputs,
            domain=DOMAIN,
            num_groups=NUM_GROUPS,
            epsilon=EPS,
            silu=silu,
            channels_first=channels_first,
            zero_point=zero_point,
        )

    def _codes(self, pending: Pending | None) -> list[ir.Value | None]:
        if pending is None:
            return [None] * 3
        ops = self.writer.ops
        zero_point = ops.constant(np.asarray(pending.zero_point), "uint8")
        return [pending.codes, ops.constant(pending.scale, "float32"), zero_point]
