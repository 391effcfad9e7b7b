"""Quantization of an export: which tensors of the weights file, made one at a time, and how a graph
reads them.

Quantized are the matrices of the language model's layers (qkv, o, gate_up, down: more than nine
tenths of the bytes) and, in a format that may be another, those of the generation head and the
aligner's second. Norms, embeddings, the codebook, the image decoder and the aligner's first matrix,
whose inputs are the codebook's few numbers, keep the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from ssd_export.bundle.config import Precision, WeightFormat
from ssd_export.dtypes import of_torch
from ssd_export.errors import UserError
from ssd_export.export.operators import OPSET, Operators, onnx_dtype
from ssd_export.model.quantization import (
    BLOCKS,
    STORED_DTYPES,
    Scheme,
    quantized_rows,
    scale_shape,
    stored_shape,
    to_stored,
)

if TYPE_CHECKING:
    from ssd_export.export.weights import Weight

# DequantizeLinear: float16 scales and float8 came with opset 19, blocks and INT4 with 21
OPSETS = {"none": OPSET, "int8": 19, "fp8": 19, "int4": 21}
HEAD_MATRICES = (
    "generation_aligner.hidden_layers.0",
    "generation_head.proj_out",
    "generation_head.vision_head",
)
ONNX_TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


class QuantizedMatrix:
    """The two tensors of one matrix, made in one pass; whichever is asked for first keeps the other
    for the next call.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        sources: Sequence[Callable[[], Tensor]],
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> None:
        """Args: shape: [in, out], all sources side by side."""
        self._name, self._shape, self._sources = name, shape, sources
        self._scheme, self._dtype = scheme, dtype
        self._waiting: dict[str, Tensor] = {}

    def codes(self) -> Tensor:
        """Codes in their stored form; the scales made with them are kept for the next call."""
        return self._take("codes")

    def scale(self) -> Tensor:
        """Scales in their stored form; the codes made with them are kept for the next call."""
        return self._take("scale")

    def _take(self, part: str) -> Tensor:
        if part not in self._waiting:
            try:
                self._waiting = self._make()
            except UserError as error:
                raise UserError(f"{self._name}: {error}") from None
        return self._waiting.pop(part)

    def _make(self) -> dict[str, Tensor]:
        """Both tensors, written a few output channels at a time: beside them only one source is in
        memory.
        """
        scheme = self._scheme
        codes = torch.empty(stored_shape(scheme, *self._shape), dtype=STORED_DTYPES[scheme.format])
        scales = torch.empty(scale_shape(scheme, *self._shape), dtype=self._dtype)
        at = scale_at = 0
        for source in self._sources:
            for rows in quantized_rows(source(), scheme, self._dtype):
                some, their_scales = to_stored(*rows, scheme)
                codes[:, at : at + some.shape[1]] = some
                scales[..., scale_at : scale_at + their_scales.shape[-1]] = their_scales
                at, scale_at = at + some.shape[1], scale_at + their_scales.shape[-1]
        return {"codes": codes, "scale": scales}


def scale_name(name: str) -> str:
    """The name of the scales of a quantized matrix."""
    return f"{name}.scale"


def onnx_type(weight: Weight) -> tuple[ir.DataType, tuple[int, ...]]:
    """Type and shape of a tensor of the weights file as an initializer."""
    if weight.scheme is None or weight.dtype != STORED_DTYPES[weight.scheme.format]:
        return onnx_dtype(of_torch(weight.dtype).name), weight.shape
    rows, columns = weight.shape
    return ONNX_TYPES[weight.scheme.format], (
        rows,
        columns * (2 if weight.scheme.format == "int4" else 1),
    )


def opset_of(weights: Iterable[Weight]) -> int:
    """The least opset that reads all of them."""
    return max(OPSETS[weight.scheme.format if weight.scheme else "none"] for weight in weights)


def dequantize_node(ops: Operators, codes: ir.Value, scale: ir.Value, scheme: Scheme) -> ir.Value:
    """The matrix [in, out] in the scale's dtype. In this form ONNX Runtime fuses it with its MatMul
    into MatMulNBits.
    """
    if scheme.block:
        return ops.op("DequantizeLinear", codes, scale, axis=0, block_size=scheme.block)
    return ops.op("DequantizeLinear", codes, scale, axis=1)


def reads_codes(weight: Weight) -> bool:
    """Whether engines/operators multiplies by its codes."""
    return weight.scheme is not None and weight.scheme.format in ("int8", "int4")


def precision_facts(
    weights_format: WeightFormat, head_format: WeightFormat, weights: Iterable[Weight]
) -> Precision:
    """The entry of `ssd_config.json` on the precision of the weights."""
    weights = list(weights)
    quantized_bytes = sum(weight.num_bytes for weight in weights if weight.scheme)
    if "int4" not in (weights_format, head_format):
        return Precision(weights_format, head_format, quantized_bytes)
    wanted = [
        weight
        for weight in weights
        if _format_of(weight.name, weights_format, head_format) == "int4"
    ]
    blocks = {weight.name: weight.scheme.block for weight in wanted if weight.scheme}
    return Precision(
        weights_format,
        head_format,
        quantized_bytes,
        block=BLOCKS[0],
        other_blocks={name: block for name, block in blocks.items() if block != BLOCKS[0]},
        kept=tuple(weight.name for weight in wanted if weight.scheme is None),
    )


def _format_of(name: str, weights: WeightFormat, head: WeightFormat) -> WeightFormat:
    """The format that is asked for a tensor of the weights file; none of what is no matrix."""
    if name in HEAD_MATRICES:
        return head
    return weights if name.startswith("layers.") and not name.endswith(".scale") else "none"


def block_lines(facts: Precision) -> list[str]:
    """Lines to print where int4 blocks are not the usual ones: tensors of a kind in one line."""
    lines = []
    for block in sorted(set(facts.other_blocks.values()), reverse=True):
        names = [name for name, own in facts.other_blocks.items() if own == block]
        lines.append(
            f"int4 in blocks of {block}, because {facts.block} does not divide their inputs:"
            f" {_kinds(names)}"
        )
    if facts.kept:
        lines.append(
            f"not quantized, because no block of {', '.join(map(str, BLOCKS))} divides their inputs"
            f" or their outputs are odd: {_kinds(facts.kept)}"
        )
    return lines


def _kinds(names: Iterable[str]) -> str:
    """layers.0.down, layers.1.down as "down (2 layers)"; a matrix of the head by its name."""
    counts: dict[str, int] = {}
    for name in names:
        kind = name.split(".")[-1] if name.startswith("layers.") else name
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(
        kind if kind in HEAD_MATRICES else f"{kind} ({count} layers)"
        for kind, count in counts.items()
    )
