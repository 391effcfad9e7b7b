"""Gumbel noise of the token race: a pure function of seed, step, image and code, with the same bits
in numpy, torch, Triton and C++.

A token is the arg-max over the codebook of `guided logit / temperature + g(code)`, with one Gumbel
number g = -log(-log u) for each code: an exact draw from softmax(guided logit / temperature). Since
g belongs to the code, a draw hardly moves when logits hardly move.

Definition, in unsigned 32-bit words, signed 32-bit integers (`>>` is arithmetic) and IEEE float32.
Every operation rounds once, to nearest even: no fused multiply-add, no approximate division. No
number on the way is subnormal.

    word      Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
              the Random123 library): output word `code mod 4` of
                  key      (seed mod 2^32, seed div 2^32)
                  counter  (step, image, code div 4, 0)
    u         float32((word >> 8) | 1) x 2^-24: an odd multiple of 2^-24, exact, inside (0, 1)
    g         negative_log(negative_log(u))

    negative_log(x) of a float32 x > 0 that is not subnormal:
        bits      = the int32 with the bits of x
        exponent  = (bits - SQRT_HALF_BITS) >> 23
        m         = the float32 with the bits of bits - (exponent << 23); in [sqrt 1/2, sqrt 2)
        f         = m - 1                                                        (exact)
        s         = f / (f + 2)
        z         = s x s
        p         = (P2 x z + P1) x z + P0                                       (p x s: -log m)
        result    = float32(exponent) x MINUS_LOG_2 + s x p

negative_log is within 4 units in the last place of the true logarithm, or 1e-7 of 0 near 1, so no
test of 10^6 draws tells the race from softmax. `step` is the number of the image token, from 0.
tests/noise_vectors.json holds words and bits of g for tests of other implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, square root of 3
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF
WORDS_PER_COUNTER = 4

UNIT = 2.0**-24
SQRT_HALF_BITS = 0x3F3504F3
MANTISSA_BITS = 23
P0 = float.fromhex("-0x1.000002p+1")  # minimax in relative error: 1.2e-7
P1 = float.fromhex("-0x1.554268p-1")
P2 = float.fromhex("-0x1.a6dff6p-2")
MINUS_LOG_2 = float.fromhex("-0x1.62e430p-1")

MULTIPLIERS = tuple(np.uint64(number) for number in PHILOX_MULTIPLIERS)
CROSSED_MULTIPLIERS = np.array(PHILOX_MULTIPLIERS[::-1], np.uint64)[:, None, None]
ZERO, HALF, LOW_WORD = np.uint64(0), np.uint64(32), np.uint64(WORD)
COUNTERS = 16_384  # of one pass: fewer cost more calls of numpy, more leave a core's cache


class ImageSeed(NamedTuple):
    """Key of an image's random numbers: the seed of its request (64 bits) and its number there (32
    bits).
    """

    seed: int
    image: int


class GumbelNoise:
    """Writes the noise of a batch of images; keeps its work space between calls."""

    def __init__(self, images: Sequence[ImageSeed], codebook_size: int) -> None:
        """Raises ValueError for a seed or an image number of more bits."""
        for seed, image in images:
            if not (0 <= seed < 1 << 64 and 0 <= image <= WORD):
                raise ValueError(f"seed {seed} must have 64 bits and image {image} 32, unsigned")
        self.images, self.codebook_size = tuple(images), codebook_size
        self._keys = {seed: _round_keys(seed) for seed, _ in images}
        self._block = np.arange(-(-codebook_size // WORDS_PER_COUNTER), dtype=np.uint64)
        self._steps_at_once = max(1, COUNTERS // len(self._block))
        counters = self._steps_at_once * len(self._block)
        self._words = np.empty((3, 2 * counters), np.uint64)
        self._floats = np.empty((4, WORDS_PER_COUNTER * counters), np.float32)

    def __call__(self, steps: range) -> np.ndarray:
        """g of these steps, float32 [steps, images, codebook]."""
        noise = np.empty((len(steps), len(self.images), self.codebook_size), np.float32)
        self.fill(noise, steps)
        return noise

    def fill(self, noise: np.ndarray, steps: range) -> None:
        """Writes g of these steps to the first rows of noise, float32 [any, images, codebook]."""
        for start in range(0, len(steps), self._steps_at_once):
            part = steps[start : start + self._steps_at_once]
            for column, image in enumerate(self.images):
                noise[start : start + len(part), column] = self._of_image(image, part)

    def _of_image(self, image: ImageSeed, steps: range) -> np.ndarray:
        """float32 [steps, codebook], a view of the work space."""
        words = self._philox(image, steps)
        words >>= np.uint32(8)
        words |= np.uint32(1)
        x = self._floats[1][: len(words)]
        np.copyto(x, words.view(np.int32), casting="unsafe")
        x *= np.float32(UNIT)
        scratch = [self._floats[place][: len(words)] for place in (0, 2, 3)]
        negative_log(x, *scratch)
        negative_log(x, *scratch)
        return x.reshape(len(steps), -1)[:, : self.codebook_size]

    def _philox(self, image: ImageSeed, steps: range) -> np.ndarray:
        """uint32 words in the order of step, block and word; a view of the work space.

        The first two rounds mix numbers of steps with numbers of blocks. The other eight go over
        all counters: even holds words 0 and 2, odd words 1 and 3, so that a call serves two words.
        """
        shape = (2, len(steps), len(self._block))
        even, odd, product = (words[: prod(shape)].reshape(shape) for words in self._words)
        keys = self._keys[image.seed]
        counter: Words = (
            np.array(steps, np.uint64)[:, None],
            np.uint64(image.image),
            self._block,
            ZERO,
        )
        for key in keys[:2]:
            counter = _philox_round(counter, key)
        for place in range(2):
            even[place], odd[place] = counter[2 * place], counter[2 * place + 1]
        for key in keys[2:]:
            np.multiply(even[::-1], CROSSED_MULTIPLIERS, out=product)
            np.right_shift(product, HALF, out=even)
            even ^= odd
            even ^= key[:, None, None]
            np.bitwise_and(product, LOW_WORD, out=odd)
        words = self._floats[0].view(np.uint32)[: 2 * prod(shape)].reshape(*shape[1:], 2, 2)
        words[..., 0], words[..., 1] = np.moveaxis(even, 0, -1), np.moveaxis(odd, 0, -1)
        return words.reshape(-1)


Word = np.ndarray | np.uint64
Words = tuple[Word, Word, Word, Word]


def philox4x32(counter: Words, seed: int) -> Words:
    """Four output words of each counter, uint64 below 2^32.

    Args: counter: 4 uint64 arrays of words, of shapes that broadcast.
    """
    for key in _round_keys(seed):
        counter = _philox_round(counter, key)
    return counter


def _philox_round(counter: Words, key: np.ndarray) -> Words:
    first, second = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
    return (
        (second >> HALF) ^ counter[1] ^ key[0],
        second & LOW_WORD,
        (first >> HALF) ^ counter[3] ^ key[1],
        first & LOW_WORD,
    )


def _round_keys(seed: int) -> np.ndarray:
    """uint64 [rounds, 2] of words below 2^32."""
    words = seed & WORD, seed >> 32
    return np.array(
        [
            [word + number * weyl & WORD for word, weyl in zip(words, PHILOX_WEYL)]
            for number in range(PHILOX_ROUNDS)
        ],
        np.uint64,
    )


def negative_log(x: np.ndarray, t: np.ndarray, exponent: np.ndarray, p: np.ndarray) -> None:
    """Puts -log x in the place of x. All float32 [n]; t, exponent and p are work space."""
    bits, shifted, exponent_bits = (array.view(np.int32) for array in (x, t, p))
    np.subtract(bits, np.int32(SQRT_HALF_BITS), out=exponent_bits)
    exponent_bits >>= np.int32(MANTISSA_BITS)
    np.left_shift(exponent_bits, np.int32(MANTISSA_BITS), out=shifted)
    bits -= shifted
    np.copyto(exponent, exponent_bits, casting="unsafe")
    exponent *= np.float32(MINUS_LOG_2)
    x -= np.float32(1)
    np.add(x, np.float32(2), out=t)
    x /= t
    np.multiply(x, x, out=t)
    np.multiply(t, np.float32(P2), out=p)
    p += np.float32(P1)
    p *= t
    p += np.float32(P0)
    x *= p
    x += exponent
