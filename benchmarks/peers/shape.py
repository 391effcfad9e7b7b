"""The shape that every peer computes: some layers of Janus-Pro-1B and its head, random weights.

Imported by peers in their environment: numpy and the standard library only.
"""

from __future__ import annotations

import numpy as np

HIDDEN_SIZE = 2048
INTERMEDIATE_SIZE = 5632
NUM_HEADS = 16
HEAD_DIM = 128
CODEBOOK_SIZE = 16384
CONTEXT = 320  # tokens in the caches: a prompt of 32 and half an image
ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-6
_NOISE = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)


def random_matrix(num_outputs: int, num_inputs: int, number: int) -> np.ndarray:
    """float32 [out, in] of about unit gain, made in the time of a copy.

    Args: number: another one for each matrix of a model. OpenVINO stores equal matrices once.
    """
    noise = np.roll(_NOISE, 7919 * number)
    return np.resize(noise, (num_outputs, num_inputs)) * np.float32(num_inputs**-0.5)


def random_rows(*shape: int) -> np.ndarray:
    """float32 of this shape, normally distributed."""
    return np.resize(_NOISE, shape)
