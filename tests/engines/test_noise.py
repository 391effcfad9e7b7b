"""Gumbel noise of the C++ library: the same bits as numpy's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ssd_export.noise import GumbelNoise, ImageSeed
from tests.engines.builds import Builds, run

VECTORS = json.loads((Path(__file__).parents[1] / "noise_vectors.json").read_text())["vectors"]


def noise_bits(build: Builds, *arguments: int) -> np.ndarray:
    ran = run([build("release") / "tests" / "ssd_noise", *map(str, arguments)])
    assert ran.returncode == 0, ran.stderr
    return np.array([int(line, 16) for line in ran.stdout.split()], np.uint32)


@pytest.mark.slow
def test_the_committed_vectors(build: Builds) -> None:
    for vector in VECTORS:
        step, image, code = vector["step"], vector["image"], vector["code"]
        bits = noise_bits(build, int(vector["seed"], 16), image, code + 1, step, 1, code)
        assert bits.tolist() == [int(vector["noise_bits"], 16)], vector


@pytest.mark.slow
@pytest.mark.parametrize("seed, image, codebook", [(0, 0, 16_384), (2**64 - 1, 3, 1_663)])
def test_whole_rows(build: Builds, seed: int, image: int, codebook: int) -> None:
    expected = GumbelNoise([ImageSeed(seed, image)], codebook)(range(22, 27))
    bits = noise_bits(build, seed, image, codebook, 22, 5)
    np.testing.assert_array_equal(bits, expected.view(np.uint32).reshape(-1))
