"""Noise of the token race: Philox by its published vectors, the bits of g by a scalar form and a
committed table, and what an image's randomness must keep."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.noise import GumbelNoise, ImageSeed, negative_log, philox4x32

VECTORS = json.loads((Path(__file__).parent / "noise_vectors.json").read_text())["vectors"]
WORD = (1 << 32) - 1
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


def as_float32(value: float) -> float:
    """Rounded to float32: of a sum, product or quotient of two float32 numbers in float64 this is
    the float32 operation."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bits_of(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def scalar_word(seed: int, step: int, image: int, code: int) -> int:
    """The word in plain integers, one at a time: how another language would write it."""
    c, k = [step, image, code // 4, 0], [seed & WORD, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c[code % 4]


def scalar_negative_log(x: float) -> float:
    bits = bits_of(x)
    exponent = (bits - 0x3F3504F3) >> 23
    m = struct.unpack("<f", struct.pack("<i", bits - (exponent << 23)))[0]
    f = as_float32(m - 1)
    s = as_float32(f / as_float32(f + 2))
    z = as_float32(s * s)
    p = as_float32(float.fromhex("-0x1.a6dff6p-2") * z)
    p = as_float32(as_float32(p + float.fromhex("-0x1.554268p-1")) * z)
    p = as_float32(p + float.fromhex("-0x1.000002p+1"))
    return as_float32(as_float32(exponent * float.fromhex("-0x1.62e430p-1")) + as_float32(s * p))


def scalar_noise(word: int) -> float:
    return scalar_negative_log(scalar_negative_log(((word >> 8) | 1) * 2.0**-24))


def one(seed: int, step: int, image: int, code: int) -> float:
    noise = GumbelNoise([ImageSeed(seed, image)], code + 1)
    return float(noise(range(step, step + 1))[0, 0, code])


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, output: str) -> None:
    arrays = tuple(np.array([word], np.uint64) for word in words(counter))
    first, second = words(key)
    assert [int(word[0]) for word in philox4x32(arrays, first + (second << 32))] == words(output)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 575),
    st.integers(0, WORD),
    st.integers(0, 20_000),
)
def test_the_noise_has_the_bits_of_the_scalar_form(
    seed: int, step: int, image: int, code: int
) -> None:
    expected = scalar_noise(scalar_word(seed, step, image, code))
    assert bits_of(one(seed, step, image, code)) == bits_of(expected)


def test_the_committed_vectors_are_the_scalar_forms_and_numpys() -> None:
    for entry in VECTORS:
        place = (int(entry["seed"], 16), entry["step"], entry["image"], entry["code"])
        word = scalar_word(*place)
        assert f"{word:08x}" == entry["word"]
        assert f"{bits_of(scalar_noise(word)) & WORD:08x}" == entry["noise_bits"]
        assert bits_of(one(*place)) & WORD == int(entry["noise_bits"], 16)
    extremes = {entry["word"][:6] for entry in VECTORS}
    assert {"000000", "ffffff"} <= extremes, "the least and the greatest u are among them"


def test_negative_log_is_the_logarithm() -> None:
    x = np.exp(np.random.default_rng(0).uniform(-17, 3, 100_000)).astype(np.float32)
    x = np.append(x, np.float32([2.0**-24, 1 - 2.0**-24, 1, 0.70710677, 0.70710683, 1.4142135]))
    expected, computed = -np.log(x.astype(np.float64)), x.copy()
    negative_log(computed, *(np.empty_like(x) for _ in range(3)))
    error, unit = np.abs(computed - expected), np.spacing(np.abs(expected).astype(np.float32))
    assert (error <= np.maximum(4 * unit, 1e-7)).all()
    below_one = x < 1
    assert (computed[below_one] > 0).all(), "its logarithm is taken again"


def test_an_image_does_not_depend_on_its_company() -> None:
    images = [ImageSeed(7, 3), ImageSeed(2**63, 0), ImageSeed(7, 0), ImageSeed(8, 3)]
    together = GumbelNoise(images, 33)(range(20, 30))
    for column, image in enumerate(images):
        alone = GumbelNoise([image], 33)
        np.testing.assert_array_equal(alone(range(20, 30))[:, 0], together[:, column])
        np.testing.assert_array_equal(alone(range(25, 26))[0, 0], together[5, column])


@pytest.mark.parametrize("codebook_size", [1, 3, 4, 50, 16_384, 70_001])
def test_any_codebook_size_begins_with_the_same_noise(codebook_size: int) -> None:
    images, steps = [ImageSeed(1, 0), ImageSeed(1, 1)], range(574, 576)
    noise = GumbelNoise(images, codebook_size)(steps)
    assert noise.shape == (2, 2, codebook_size) and noise.dtype == np.float32
    largest = GumbelNoise(images, 70_001)(steps)
    np.testing.assert_array_equal(noise, largest[..., :codebook_size])


def test_only_the_steps_that_are_asked_for_are_written() -> None:
    noise = np.full((24, 1, 8), 7, np.float32)
    GumbelNoise([ImageSeed(0, 0)], 8).fill(noise, range(0, 5))
    assert (noise[5:] == 7).all() and (noise[:5] != 7).all()


def test_moments_and_independence() -> None:
    images = [ImageSeed(2**63 + 11, image) for image in range(50)]
    noise = GumbelNoise(images, 64)(range(576)).astype(np.float64)
    error = noise.size**-0.5
    assert abs(noise.mean() - np.euler_gamma) < 4 * 1.283 * error
    assert abs(noise.var() - np.pi**2 / 6) < 4 * 2.97 * error  # of a Gumbel number's kurtosis 5.4
    other = GumbelNoise([ImageSeed(2**63 + 12, image) for image in range(50)], 64)(range(576))
    pairs = [
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[..., 1:], noise[..., :-1]),
        (noise, other),
    ]
    for first, second in pairs:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 * error


def test_every_bit_of_seed_and_image_counts() -> None:
    seeds = [ImageSeed(1 << bit, 0) for bit in range(64)]
    images = [ImageSeed(0, 1 << bit) for bit in range(32)]
    noise = GumbelNoise([ImageSeed(0, 0), *seeds, *images], 4)(range(1))[0]
    assert len({row.tobytes() for row in noise}) == 97


@pytest.mark.parametrize("image", [(-1, 0), (1 << 64, 0), (0, -1), (0, 1 << 32)])
def test_numbers_of_too_many_bits_are_refused(image: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        GumbelNoise([ImageSeed(*image)], 4)
