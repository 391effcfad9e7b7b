"""Checks that what a runner computes is finite: tokens and pixels of NaN look like any others."""

from __future__ import annotations

import numpy as np

from ssd_export.errors import UserError


class NotFiniteError(UserError):
    """NaN or infinite values where a model must give numbers."""


def check_logits(logits: np.ndarray, step: int, dtype: str) -> None:
    """Raises NotFiniteError for logits [rows, V] of an image token that hold NaN or infinity."""
    if not np.isfinite(logits).all():
        raise NotFiniteError(f"the logits of image token {step} are not finite: {cause(dtype)}")


def to_pixels(levels: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 of float levels 0..255, truncated as Janus does. Raises: NotFiniteError for NaN."""
    if not np.isfinite(levels).all():
        raise NotFiniteError(f"the pixels of an image are not finite: {cause(dtype)}")
    return levels.astype(np.uint8)


def cause(dtype: str) -> str:
    """The likely cause of values that are not finite in this dtype, and the way out."""
    if dtype == "float16":
        return (
            "this model's numbers do not fit float16 (65504 at most); export it again with --dtype"
            " bf16 or --dtype fp32"
        )
    return (
        "the weights are damaged or the checkpoint's own are not finite; get the checkpoint again"
        " and export it again"
    )
