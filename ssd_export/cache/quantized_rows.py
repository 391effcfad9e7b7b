"""Keys and values in int8, each row (one token of one head) with its own scale, in torch: the
reference for the graphs.

A row is code / 127 x scale, where scale is the row's greatest magnitude in float32. Attention
multiplies the codes and scales what comes out: logits = (codes @ query / 127) x key scale, out =
(probs x value scale) @ codes / 127. So no float copy of a cache is scaled, and in float16 no sum of
codes overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_export.policy.table import GREATEST_CODE, LEAST_SCALE


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., D] and scales float32 [...] of rows [..., D]."""
    wide = rows.float()
    scale = wide.abs().amax(dim=-1)
    # not GREATEST_CODE / scale: torch takes the reciprocal of the tensor first, and rounds twice
    factor = torch.full_like(scale, GREATEST_CODE).div_(scale.clamp(min=LEAST_SCALE))
    return (wide * factor[..., None]).round().to(torch.int8), scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 rows [..., D] of what quantize_rows gave."""
    return codes.float() * (scale / GREATEST_CODE)[..., None]
