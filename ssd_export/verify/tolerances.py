"""Tolerances between two backends, by the dtype of weights and cache: the one table that `verify`,
the tests and the benchmarks read.

Slots and tokens are compared exactly, but for what rounding explains: of two tokens whose scores
are equal within `tie` (relative) either may be evicted, and a random number may fall on either side
of a border that the measured difference of the logits moves across it. Everything else by error():
the greatest difference over the greatest magnitude (at least 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """Tolerances of one dtype. op: outputs and scores of one attention step; kernel: outputs (below
    4) of the decode attention kernel, which is float32 inside, so that its scores keep to float32's
    op; cache: keys, values and scores in a model; psnr in dB.
    """

    op: float
    kernel: float
    cache: float
    logits: float
    tie: float
    min_psnr: float
    min_ssim: float


TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5, 1e-3, 1e-3, 1e-4, 50.0, 0.999),
    "float16": Tolerance(2e-2, 2e-3, 2e-2, 2e-2, 2e-2, 35.0, 0.98),
    "bfloat16": Tolerance(1e-1, 1.6e-2, 1e-1, 1e-1, 1e-1, 30.0, 0.95),
}


ONE_CODE = 1.01 / 127  # of keys and values in int8: rounding may fall on either side
INT8_CACHE = 2e-2  # what such codes may do to scores and logits


def tolerance_of(dtype: str, kv_dtype: str) -> Tolerance:
    """TOLERANCES[dtype], wider where keys and values are int8."""
    found = TOLERANCES[dtype]
    if kv_dtype == "model":
        return found
    cache, logits, tie = (
        max(value, INT8_CACHE) for value in (found.cache, found.logits, found.tie)
    )
    return replace(found, cache=cache, logits=logits, tie=tie)


def error(values: np.ndarray, reference: np.ndarray) -> float:
    """The greatest difference, relative to the greatest magnitude of the reference but at least to
    1; NaN is infinite.
    """
    if not reference.size:
        return 0.0
    values, reference = values.astype(np.float64), reference.astype(np.float64)
    difference = np.abs(values - reference).max() / max(1.0, np.abs(reference).max())
    return float(difference) if np.isfinite(difference) else float("inf")
