"""The random numbers of a picture: the same on every backend, a pure function of seed, step and
image.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the Random123
library).
    key      (low word of seed, high word of seed)
    counter  (step, image, 0, 0)
    uniform  (first output word >> 8) * 2**-24: 24 bits, exact in float32, from 0 to 1 - 2**-24
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, square root of 3
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four output words a counter. Args: counter: 4 uint64 arrays of words below 2**32, of one
    shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            _high(right) ^ c1 ^ np.uint64(k0),
            _low(right),
            _high(left) ^ c3 ^ np.uint64(k1),
            _low(left),
        )
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return c0, c1, c2, c3


def uniforms(seed: int, num_images: int, num_tokens: int, first_image: int = 0) -> np.ndarray:
    """float32 [num_tokens, num_images] in [0, 1): one number an image token; the column of an image
    is the same for any num_images and first_image.

    Raises: ValueError for a seed outside 0 .. 2**64 - 1.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit number")
    step, image = np.meshgrid(
        np.arange(num_tokens, dtype=np.uint64),
        np.arange(first_image, first_image + num_images, dtype=np.uint64),
        indexing="ij",
    )
    zero = np.zeros_like(step)
    word = philox4x32((step, image, zero, zero), (seed & WORD, seed >> 32))[0]
    return (word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def _high(product: np.ndarray) -> np.ndarray:
    return product >> np.uint64(32)


def _low(product: np.ndarray) -> np.ndarray:
    return product & np.uint64(WORD)
