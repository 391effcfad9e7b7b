"""Weight-only quantization of one matrix: codes and scales, as `onnx/weights.safetensors` stores
them.

A matrix [in, out] of the weights file becomes two tensors; weight = code x scale, symmetric, no
zero point, which is DequantizeLinear of ONNX on axis 1 (one scale an output channel) or on axis 0
with a block size.

    name          int8: int8 [in, out]            int4: uint8 [in, out / 2]            fp8:
    float8_e4m3fn [in, out] name.scale    int8, fp8: [out]                int4: [in / block, out]
              in the model's dtype

int4: two codes a byte, the even output channel in the low four bits, two's complement: the order of
ONNX's INT4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.errors import UserError

WEIGHT_FORMATS = ("none", "int8", "int4", "fp8")
CODES = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}  # least and greatest
# greatest magnitude of a block / scale: the one of least squared error is taken. On the demo
# model's weights the error of int4 falls from 11.8 % (7 alone) to 10.3 %.
DIVISORS = {"int8": (127.0,), "int4": (7.0, 7.5, 8.0, 8.5), "fp8": (448.0,)}
ROUNDED_DOWN = 0.99  # of a scale: what is less cuts the greatest weights off
ROUNDED_UP = 1.2  # of a weight: a code times its scale is never more
ROWS_AT_ONCE = 64  # output channels: what is worked on stays in the processor's cache
STORED_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
BLOCKS = (128, 64, 32, 16)  # of int4: the first that divides the input size


@dataclass(frozen=True)
class Scheme:
    """Storage of one matrix. format: int8, int4 or fp8; block: inputs that share a scale, 0 where
    all inputs of an output channel do.
    """

    format: str
    block: int = 0


def choose_scheme(weights: str, num_inputs: int, num_outputs: Iterable[int]) -> Scheme | None:
    """The scheme of a matrix under `--weights weights`; None: in the model's dtype, because no
    block suits it.

    Args: num_outputs: of each of the projections side by side in it.
    """
    if weights == "none":
        return None
    if weights != "int4":
        return Scheme(weights)
    block = next((block for block in BLOCKS if num_inputs % block == 0), 0)
    return Scheme("int4", block) if block and all(count % 2 == 0 for count in num_outputs) else None


def stored_shape(scheme: Scheme, num_inputs: int, num_outputs: int) -> tuple[int, int]:
    """Shape of the codes of a matrix, as stored."""
    return (num_inputs, num_outputs // 2 if scheme.format == "int4" else num_outputs)


def scale_shape(scheme: Scheme, num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """Shape of the scales of a matrix."""
    return (num_inputs // scheme.block, num_outputs) if scheme.block else (num_outputs,)


def quantize(linear: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, in / block] (no block: [out, 1]) of linear weights [out,
    in].

    The codes are those of the scale as `dtype` holds it, so its rounding costs nothing. Codes:
    int8, or float8_e4m3fn.
    Raises: UserError where a product of both is more than dtype holds.
    """
    made = list(quantized_rows(linear, scheme, dtype))
    codes, scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    return codes, scale


def quantized_rows(
    linear: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `quantize` gives, an even number of output channels at a time, in order. Raises:
    UserError as quantize.
    """
    for rows in linear.split(ROWS_AT_ONCE):
        yield _quantize_rows(rows, scheme, dtype)


def _quantize_rows(linear: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks = linear.float().unflatten(
        1, (-1, scheme.block or linear.shape[1])
    )  # [rows, blocks, block]
    greatest = blocks.abs().amax(dim=2)
    first, *others = DIVISORS[scheme.format]
    scale = _scale(greatest, first, dtype)
    least = _squared_error(blocks, scale, scheme) if others else torch.empty(0)
    for divisor in others:
        other = _scale(greatest, divisor, dtype)
        error = _squared_error(blocks, other, scheme)
        scale, least = torch.where(error < least, other, scale), torch.minimum(error, least)
    codes = _codes(blocks, scale, scheme)
    if float(greatest.max()) * ROUNDED_UP > torch.finfo(dtype).max:
        _check_products(codes, scale, scheme)
    codes = codes.flatten(1)
    return codes.to(torch.float8_e4m3fn if scheme.format == "fp8" else torch.int8), scale


def _scale(greatest: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """[rows, blocks]; 1 where all weights are 0.

    Below 6e-5 float16 is coarse, below 3e-8 it is 0: a scale that was rounded far down, and would
    cut the greatest weights off, becomes the next one.
    """
    exact = greatest / divisor
    scale = exact.to(dtype)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = torch.where(scale.float() < ROUNDED_DOWN * exact, scale + step, scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _check_products(codes: Tensor, scale: Tensor, scheme: Scheme) -> None:
    """Raises UserError where a code times its scale, as a runtime multiplies them, is infinite."""
    products = (codes.abs().amax(dim=2) * scale.float()).to(scale.dtype)
    if not products.isfinite().all():
        raise UserError(
            f"in {scheme.format} a weight is rounded to more than"
            f" {str(scale.dtype).removeprefix('torch.')} holds ({torch.finfo(scale.dtype).max:g}):"
            " use --dtype fp32 or bf16"
        )


def _codes(blocks: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """float32 [rows, blocks, block] within the format; whole numbers but for fp8, which rounds when
    it is stored.
    """
    codes = blocks / scale.float()[:, :, None]
    return (codes if scheme.format == "fp8" else codes.round_()).clamp_(*CODES[scheme.format])


def _squared_error(blocks: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """[rows, blocks]."""
    return (
        _codes(blocks, scale, scheme)
        .mul_(scale.float()[:, :, None])
        .sub_(blocks)
        .square_()
        .sum(dim=2)
    )


def to_stored(codes: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The stored form of codes [out, in] and scales [out, blocks]."""
    codes = codes.T.contiguous()
    if scheme.format == "int4":
        nibbles = codes.view(torch.uint8) & 15
        codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return codes, scale.T.contiguous() if scheme.block else scale[:, 0].contiguous()


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    """The matrix [in, out] in the scale's dtype, as DequantizeLinear gives it: float32 product,
    rounded once.
    """
    codes = _unpacked(stored) if stored.dtype == torch.uint8 else stored
    if scale.dim() == 1:
        return (codes.float() * scale.float()).to(scale.dtype)
    blocks = codes.float().unflatten(0, (scale.shape[0], -1))
    return (blocks * scale.float()[:, None]).flatten(0, 1).to(scale.dtype)


def _unpacked(packed: Tensor) -> Tensor:
    """int8 [in, out] of uint8 [in, out / 2]: an arithmetic shift of the signed byte carries the
    sign.
    """
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(1)
