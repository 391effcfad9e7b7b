"""Changes of dtype that lose nothing an image depends on: checked by what comes out.

float16 ends at 65504. A bfloat16 weight above it becomes infinite, and every image NaN, without
an error from any library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_export.dtypes import MODEL_DTYPES, of_torch
from ssd_export.errors import UserError


def check_finite(tensor: Tensor, where: str, way_out: str) -> tuple[float, float]:
    """The least and the greatest value. Raises: UserError for NaN or infinity.

    One pass without a copy: the text embedding alone has 840 MB at 7B.
    """
    if not tensor.numel():
        return 0.0, 0.0
    low, high = (float(value) for value in torch.aminmax(tensor))
    if low != low:
        raise UserError(f"{where} holds NaN: {way_out}")
    for value in (low, high):
        if abs(value) == float("inf"):
            raise UserError(f"{where} holds an infinite value ({value}): {way_out}")
    return low, high


def convert(
    tensor: Tensor, dtype: torch.dtype, where: str, way_out: str, chosen: bool = True
) -> Tensor:
    """The tensor in dtype; itself where it has that.

    Args: where: the tensor's file and name; way_out: for values that are wrong already; chosen:
    whether a user chose the dtype and can choose another.
    Raises: UserError, with the value and the dtypes that hold it, where one would become infinite
    or all of them zero.
    """
    low, high = check_finite(tensor, where, way_out)
    if tensor.dtype == dtype:
        return tensor
    value = high if high > -low else low  # of the greatest magnitude
    if not _holds(dtype, value):
        limit = torch.finfo(dtype).max
        problem = "becomes zero" if abs(value) < limit else f"is more than its limit {limit:g}"
        others = [option for option, row in MODEL_DTYPES.items() if _holds(row.torch, value)]
        fix = f"use --dtype {' or '.join(others)}" if others and chosen else way_out
        raise UserError(
            f"{where} has a greatest magnitude of {value:g}, which in"
            f" {of_torch(dtype).name} {problem}: {fix}"
        )
    return tensor.to(dtype)


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a value stays finite, and not zero unless it is. Rounding keeps the order of values,
    so the greatest magnitude speaks for all.
    """
    rounded = float(torch.tensor(value, dtype=torch.float64).to(dtype))
    return abs(rounded) != float("inf") and (rounded != 0 or value == 0)
