"""Uniforms: Philox4x32-10 by its published vectors, and what a picture's randomness must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.runtime.uniforms import philox4x32, uniforms

NUM_TOKENS = 576

# Random123, tests/kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
WORD = (1 << 32) - 1


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_uniform(seed: int, step: int, image: int) -> float:
    """The same in plain integers, one number at a time: how another language would write it."""
    c, k = [step, image, 0, 0], [seed & WORD, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return (c[0] >> 8) / 2**24


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, output: str) -> None:
    arrays = tuple(np.array([word], np.uint64) for word in words(counter))
    first, second = words(key)
    assert [int(word[0]) for word in philox4x32(arrays, (first, second))] == words(output)


@settings(max_examples=25)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, 575), st.integers(0, 4))
def test_uniforms_equal_the_scalar_form(seed: int, step: int, image: int) -> None:
    assert uniforms(seed, 5, NUM_TOKENS)[step, image] == scalar_uniform(seed, step, image)


def test_a_picture_does_not_depend_on_its_company() -> None:
    many = uniforms(7, 9, NUM_TOKENS)
    for num_images in (1, 2, 5):
        np.testing.assert_array_equal(uniforms(7, num_images, NUM_TOKENS), many[:, :num_images])


def test_shape_dtype_and_range() -> None:
    numbers = uniforms(3, 200, NUM_TOKENS)
    assert numbers.shape == (NUM_TOKENS, 200) and numbers.dtype == np.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(np.unique(numbers * 2**24 % 1)) == 1  # whole multiples of 2**-24


def test_uniformity_and_independence() -> None:
    numbers = uniforms(2**63 + 11, 200, NUM_TOKENS).astype(np.float64)
    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    chi_squared = ((counts - numbers.size / 64) ** 2 / (numbers.size / 64)).sum()
    assert 25 < chi_squared < 115  # 63 degrees of freedom, either tail below 1e-4
    for shifted in (
        numbers[1:, :-1],
        numbers[:-1, 1:],
        uniforms(2**63 + 12, 200, NUM_TOKENS)[:-1, :-1],
    ):
        assert abs(np.corrcoef(numbers[:-1, :-1].ravel(), shifted.ravel())[0, 1]) < 0.02


def test_every_bit_of_the_seed_counts() -> None:
    pictures = {uniforms(1 << bit, 1, NUM_TOKENS).tobytes() for bit in range(64)}
    assert len(pictures) == 64


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        uniforms(seed, 1, NUM_TOKENS)
