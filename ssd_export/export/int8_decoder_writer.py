"""Writes the image decoder in int8 for ONNX Runtime on the CPU: codes -> pixels in 0..255.

The contract and, but for rounding, the arithmetic are those of image_decoder_writer.py. The 3 x 3
convolutions between the first and the last multiply uint8 by int8 (com.microsoft.QLinearConv,
channels last); the first and the last, the attention and the 1 x 1 shortcuts are float32, and so is
the sum that residual blocks add to. The tensors are in a file that only int8 decoders read:
TensorRT has none of these operators, and the float decoder stays beside it.

Between two convolutions stands one Scan over a few groups of channels at a time: sum of the
residual, GroupNorm, SiLU and rounding pass over numbers that the processor's cache still holds,
where one operator after the other would fetch the whole tensor from memory each time.

Scales and weights: int8_scales.py. Where the library of operators is there, a graph of its own
operators takes this one's place (fused_decoder_writer.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ssd_export.bundle.graphs import INT8_DECODER, image_decoder_spec
from ssd_export.config import NUM_GROUPS, ModelConfig
from ssd_export.export.decoder_ranges import Range
from ssd_export.export.functions import DOMAIN
from ssd_export.export.image_decoder_writer import EPS, decoder_latents, decoder_pixels
from ssd_export.export.image_decoder_writer import attention as float_attention
from ssd_export.export.image_decoder_writer import conv as float_conv
from ssd_export.export.int8_scales import MIDDLE, InputScale, OutputScale, QuantizedWeights, phase
from ssd_export.export.onnx_writer import graph_inputs
from ssd_export.export.operators import IR_VERSION, OPSET, Operators
from ssd_export.export.tensor_file import TensorFile
from ssd_export.graph_spec import GraphSpec

MICROSOFT = "com.microsoft"
ROOT = "vqmodel.decoder"
CHUNK = 1 << 18  # numbers that one turn of a Scan takes: 1 MB in float32


@dataclass(frozen=True)
class Size:
    """Channels, height and width of a feature map."""

    channels: int
    height: int
    width: int

    @property
    def places(self) -> int:
        """Height times width."""
        return self.height * self.width

    @property
    def rows(self) -> int:
        """Channels of one turn of a Scan: whole groups, as many as fit CHUNK."""
        of_group = self.channels // NUM_GROUPS
        groups = max(1, CHUNK // (of_group * self.places))
        while NUM_GROUPS % groups:
            groups -= 1
        return groups * of_group


@dataclass
class Pending:
    """A convolution's output that nobody has read yet.

    codes: uint8 [N, height, width, C]; scale float32 and zero_point uint8, of each channel.
    """

    codes: ir.Value
    scale: np.ndarray
    zero_point: np.ndarray


@dataclass
class Int8Writer:
    """The recorder of one graph. It has what the float writer's functions ask of a GraphWriter."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    ranges: dict[str, Range]
    file: TensorFile
    kept: frozenset[str] = frozenset()
    ops: Operators = field(default_factory=Operators)
    dtype: str = "float32"
    _initializers: dict[str, ir.Value] = field(default_factory=dict)
    _images: ir.Value | None = None

    def weight(self, name: str) -> ir.Value:
        """A float32 tensor of the checkpoint."""
        return self.tensor(name, self.tensors[name].numpy())

    def tensor(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer."""
        if name not in self._initializers:
            tensor = self.file.stored(name, array)
            self._initializers[name] = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._initializers[name]

    def of_every_image(self, array: np.ndarray, rows: int) -> ir.Value:
        """A number of each channel as [N * turns, rows], for a Scan."""
        turns = array.reshape(-1, rows)
        if self._images is None:
            raise ValueError("the graph's input is not there yet")
        repeats = self.ops.op("Concat", self._images, self.ops.constant([1]), axis=0)
        return self.ops.op("Tile", self.ops.constant(turns, turns.dtype.name), repeats)

    def model(self) -> tuple[GraphSpec, ir.Model]:
        """The whole decoder, with its contract."""
        spec = image_decoder_spec(self.config, INT8_DECODER)
        inputs = graph_inputs(spec)
        self._images = self.ops.op("Shape", inputs["codes"], start=0, end=1)
        pixels = decoder_pixels(self, self._features(inputs["codes"]))
        (out,) = spec.outputs
        pixels.name, pixels.type = out.name, ir.TensorType(ir.DataType.FLOAT)
        pixels.shape = ir.Shape(out.shape)
        graph = ir.Graph(
            list(inputs.values()),
            [pixels],
            nodes=self.ops.tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1, DOMAIN: 1},
            name=spec.name,
        )
        return spec, ir.Model(graph, ir_version=IR_VERSION, producer_name="ssd-export")

    def _features(self, codes: ir.Value) -> ir.Value:
        """From codes to the last convolution's output, float32 [N, channels, height, width]."""
        vq, grid = self.config.vq, self.config.grid
        widths = [vq.base_channels * multiplier for multiplier in reversed(vq.channel_multipliers)]
        size = Size(widths[0], grid.height, grid.width)
        first = float_conv(self, decoder_latents(self, codes), f"{ROOT}.conv_in", 1)
        state: State = self.from_channels_first(first), None
        state = self._residual(state, f"{ROOT}.mid.block_1", size, widths[0])
        state = self.attention(state, f"{ROOT}.mid.attn_1", size)
        state = self._residual(state, f"{ROOT}.mid.block_2", size, widths[0])
        for level, width in enumerate(widths):
            for block in range(vq.num_res_blocks + 1):
                state = self._residual(state, f"{ROOT}.up.{level}.block.{block}", size, width)
                size = Size(width, size.height, size.width)
                if level == 0:
                    state = self.attention(state, f"{ROOT}.up.{level}.attn.{block}", size)
            if level < len(widths) - 1:
                name = f"{ROOT}.up.{level}.upsample.conv"
                double = self._float_doubled if name in self.kept else self._doubled
                state = double(state, name, size)
                size = Size(width, 2 * size.height, 2 * size.width)
        last = self.between(state, size).normed_image(f"{ROOT}.norm_out")
        return float_conv(self, last, f"{ROOT}.conv_out", 1)

    def between(self, state: State, size: Size) -> Between:
        """What stands between two convolutions."""
        return Scanned(self, state, size)

    def from_channels_first(self, x: ir.Value) -> ir.Value:
        """A float feature map [N, C, H, W] as the stream of this writer has it."""
        return x

    def shortcut(self, x: ir.Value, name: str) -> ir.Value:
        """A 1 x 1 convolution of the stream, in float32."""
        return float_conv(self, x, name, 0)

    def attention(self, state: State, name: str, size: Size) -> State:
        """The attention block of a state, in float32."""
        x = self.between(state, size).summed()
        return float_attention(self, x, name, size.channels), None

    def undoubled(self, phases: ir.Value, size: Size) -> ir.Value:
        """The four phases of a doubling, float32 [N, 4 C, H, W], as the stream [N, C, 2 H, 2 W]."""
        return self.ops.op("DepthToSpace", phases, blocksize=2, mode="DCR")

    def _residual(self, state: State, name: str, size: Size, width: int) -> State:
        codes, x = self.between(state, size).kept(f"{name}.norm1", f"{name}.conv1")
        changed = self._conv(codes, f"{name}.conv1")
        size = Size(width, size.height, size.width)
        codes = self.between((None, changed), size).normed(f"{name}.norm2", f"{name}.conv2")
        changed = self._conv(codes, f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.tensors:
            x = self.shortcut(x, f"{name}.nin_shortcut")
        return x, changed

    def _float_doubled(self, state: State, name: str, size: Size) -> State:
        """Nearest doubling and its convolution in float32: four phases as channels, then as
        places.
        """
        x = self.between(state, size).summed_channels_first()
        weight = self.tensors[f"{name}.weight"].numpy()
        bias = self.weight(f"{name}.bias")
        phases = [
            self.ops.op(
                "Conv",
                x,
                self.tensor(
                    f"{name}.{row}{column}.weight", phase(phase(weight, row, 2), column, 3)
                ),
                bias,
                pads=[1 - row, 1 - column, row, column],
            )
            for row in (0, 1)
            for column in (0, 1)
        ]
        together = self.ops.op("Concat", *phases, axis=1)
        return self.undoubled(together, size), None

    def _doubled(self, state: State, name: str, size: Size) -> State:
        """Nearest doubling and its convolution."""
        codes = self.between(state, size).quantized(name)
        out = OutputScale.of(self.ranges[name])
        weight = self.tensors[f"{name}.weight"].numpy()
        rows = []
        for row in (0, 1):
            halves = [
                self._multiply(
                    codes,
                    name,
                    f".{row}{column}",
                    phase(phase(weight, row, 2), column, 3),
                    [1 - row, 1 - column, row, column],
                    out,
                )
                for column in (0, 1)
            ]
            both = self.ops.op("Concat", *halves, axis=3)
            rows.append(self.ops.reshape(both, [-1, size.height, 2 * size.width * weight.shape[0]]))
        whole = self.ops.op("Concat", *rows, axis=2)
        whole = self.ops.reshape(whole, [-1, 2 * size.height, 2 * size.width, weight.shape[0]])
        return None, Pending(whole, out.scale, out.zero_point)

    def _conv(self, codes: ir.Value, name: str) -> Pending:
        """A 3 x 3 convolution of codes uint8 [N, height, width, C]."""
        out = OutputScale.of(self.ranges[name])
        weight = self.tensors[f"{name}.weight"].numpy()
        product = self._multiply(codes, name, "", weight, [1] * 4, out)
        return Pending(product, out.scale, out.zero_point)

    def _multiply(
        self,
        codes: ir.Value,
        name: str,
        part: str,
        weight: np.ndarray,
        pads: list[int],
        out: OutputScale,
    ) -> ir.Value:
        """One QLinearConv, uint8 [N, height, width, C out]."""
        seen, bias = self.ranges[name], self.tensors[f"{name}.bias"].numpy()
        into = InputScale.of(seen)
        weights = QuantizedWeights.of(weight, bias, seen, into, out)
        path = f"{name}{part}"
        return self.ops.many(
            "QLinearConv",
            codes,
            self.ops.constant(into.common, "float32"),
            self.ops.constant(into.zero_point, "uint8"),
            self.tensor(f"{path}.weight.codes", weights.codes),
            self.tensor(f"{path}.weight.scale", weights.scale),
            self.tensor(f"{path}.weight.zero_point", np.zeros(len(weight), np.int8)),
            self.ops.constant(1.0, "float32"),
            self.ops.constant(MIDDLE, "uint8"),
            self.tensor(f"{path}.bias.codes", weights.bias),
            num_outputs=1,
            domain=MICROSOFT,
            channels_last=1,
            pads=pads,
        )[0]


State = tuple["ir.Value | None", "Pending | None"]  # float32 [N, C, H, W] and what is to be added


class Between(Protocol):
    """The operators between two convolutions: the sum of the residual, and what comes of it. Codes
    are uint8 [N, H, W, C] for the convolution that is named; the stream is float32.
    """

    def kept(self, norm: str, quantize_for: str) -> tuple[ir.Value, ir.Value]:
        """Codes of SiLU of GroupNorm of the sum, and the sum itself."""

    def normed(self, norm: str, quantize_for: str) -> ir.Value:
        """Codes of SiLU of GroupNorm of the sum."""

    def normed_image(self, norm: str) -> ir.Value:
        """SiLU of GroupNorm of the sum, float32 [N, C, H, W]."""

    def quantized(self, quantize_for: str) -> ir.Value:
        """Codes of the sum."""

    def summed(self) -> ir.Value:
        """The sum."""

    def summed_channels_first(self) -> ir.Value:
        """The sum, float32 [N, C, H, W]."""


@dataclass
class Scanned:
    """The operators between two convolutions as one Scan over groups of channels; the stream is
    [N, C, H, W].
    """

    writer: Int8Writer
    state: State
    size: Size
    _body: Operators = field(default_factory=Operators)
    _prefix: str = ""
    _inner: list[ir.Value] = field(default_factory=list)
    _outer: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefix = f"between_{len(self.writer.ops.tape.nodes)}"

    def kept(self, norm: str, quantize_for: str) -> tuple[ir.Value, ir.Value]:
        """See Between."""
        codes, x = self._normed(norm, quantize_for, keep=True)
        assert x is not None
        return codes, x

    def normed(self, norm: str, quantize_for: str) -> ir.Value:
        """See Between."""
        return self._normed(norm, quantize_for)[0]

    def normed_image(self, norm: str) -> ir.Value:
        """See Between."""
        return self._normed(norm, "")[0]

    def quantized(self, quantize_for: str) -> ir.Value:
        """See Between."""
        total = self._sum()
        flat = self._body.reshape(total, [1, self.size.rows, -1])
        return self._scan(flat, quantize_for)[0]

    def summed(self) -> ir.Value:
        """See Between."""
        x, pending = self.state
        if pending is None:
            assert x is not None
            return x
        return self.quantized("")

    def summed_channels_first(self) -> ir.Value:
        """See Between."""
        return self.summed()

    def _normed(
        self, norm: str, quantize_for: str, keep: bool = False
    ) -> tuple[ir.Value, ir.Value | None]:
        ops, rows = self._body, self.size.rows
        x = self._sum()
        groups = rows * NUM_GROUPS // self.size.channels
        normed = ops.op(
            "InstanceNormalization",
            ops.reshape(x, [1, groups, -1]),
            ops.constant([1.0] * groups, "float32"),
            ops.constant([0.0] * groups, "float32"),
            epsilon=EPS,
        )
        weights = self.writer.tensors
        gamma, beta = (
            self._parameter(weights[f"{norm}.{part}"].numpy()) for part in ("weight", "bias")
        )
        scaled = ops.op(
            "BatchNormalization",
            ops.reshape(normed, [1, rows, self.size.places]),
            gamma,
            beta,
            ops.constant([0.0] * rows, "float32"),
            ops.constant([1.0] * rows, "float32"),
            epsilon=0.0,
        )
        silu = ops.many("QuickGelu", scaled, num_outputs=1, domain=MICROSOFT, alpha=1.0)[0]
        return self._scan(silu, quantize_for, x if keep else None)

    def _sum(self) -> ir.Value:
        """The residual stream inside the body, float32 [rows, places]."""
        x, pending = self.state
        parts = []
        if pending is not None:
            ops = self.writer.ops
            flat = ops.op("Reshape", pending.codes, ops.constant([0, -1, self.size.channels]))
            codes = ops.op("Transpose", flat, perm=[0, 2, 1])
            parts.append(
                self._body.op(
                    "DequantizeLinear",
                    self._input(codes, ir.DataType.UINT8),
                    self._parameter(pending.scale),
                    self._parameter(pending.zero_point),
                    axis=0,
                )
            )
        if x is not None:
            parts.append(self._input(x, ir.DataType.FLOAT))
        return parts[0] if len(parts) == 1 else self._body.op("Add", *parts)

    def _input(self, whole: ir.Value, dtype: ir.DataType) -> ir.Value:
        shape = [self.size.rows, self.size.places]
        self._outer.append(self.writer.ops.reshape(whole, [-1, *shape]))
        return self._inside(shape, dtype)

    def _parameter(self, of_channels: np.ndarray) -> ir.Value:
        self._outer.append(self.writer.of_every_image(of_channels, self.size.rows))
        return self._inside([self.size.rows], ir.tensor(of_channels).dtype)

    def _inside(self, shape: list[int], dtype: ir.DataType) -> ir.Value:
        name = f"{self._prefix}.in_{len(self._inner)}"
        self._inner.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
        return self._inner[-1]

    def _scan(
        self, result: ir.Value, quantize_for: str, kept: ir.Value | None = None
    ) -> tuple[ir.Value, ir.Value | None]:
        """The Scan with this body; result [1, rows, places]."""
        ops, size, x = self.writer.ops, self.size, None
        if quantize_for:
            into = InputScale.of(self.writer.ranges[quantize_for])
            result = self._body.op(
                "QuantizeLinear",
                result,
                self._parameter(into.scale),
                self._body.constant([into.zero_point] * size.rows, "uint8"),
                axis=1,
            )
        if kept in self._inner:  # nothing was added
            kept, x = None, self.state[0]
        outputs = [result] if kept is None else [result, kept]
        kinds = [ir.DataType.UINT8 if quantize_for else ir.DataType.FLOAT, ir.DataType.FLOAT]
        for index, (value, kind) in enumerate(zip(outputs, kinds)):
            value.name, value.type = f"{self._prefix}.out_{index}", ir.TensorType(kind)
        self._name_inner()
        body = ir.Graph(self._inner, outputs, nodes=self._body.tape.nodes, name="between")
        found = ops.many(
            "Scan",
            *self._outer,
            num_outputs=len(outputs),
            body=ir.AttrGraph("body", body),
            num_scan_inputs=len(self._outer),
        )
        shape = [-1, size.channels, size.height, size.width]
        if kept is not None:
            x = ops.reshape(found[1], shape)
        if not quantize_for:
            return ops.reshape(found[0], shape), x
        codes = ops.reshape(found[0], [-1, size.channels, size.places])
        codes = ops.op("Transpose", codes, perm=[0, 2, 1])
        return ops.reshape(codes, [-1, size.height, size.width, size.channels]), x

    def _name_inner(self) -> None:
        """Names values as nothing outside is named: ONNX has one space of names for both."""
        values = (value for node in self._body.tape.nodes for value in node.outputs)
        for index, value in enumerate(values):
            value.name = value.name or f"{self._prefix}.{index}"
