"""Noise of a grid row: made once a row, zeros for a greedy batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ssd_export.config import Grid
from ssd_export.model.families import PUBLISHED
from ssd_export.noise import GumbelNoise, ImageSeed
from ssd_export.runtime.grid_row_noise import GridRowNoise

CONFIG = replace(PUBLISHED["janus-pro-1b"], grid=Grid(5, 7), codebook_size=10)
IMAGES = [ImageSeed(4, 0), ImageSeed(9, 2)]


def test_a_row_is_made_when_it_is_reached_and_then_kept() -> None:
    rows, every = (
        GridRowNoise(IMAGES, CONFIG),
        GumbelNoise(IMAGES, 10)(range(3 * CONFIG.grid.width)),
    )
    for step in (
        0,
        1,
        CONFIG.grid.width - 1,
        CONFIG.grid.width,
        CONFIG.grid.width + 3,
        2 * CONFIG.grid.width,
        5,
    ):
        made = rows.reach(step)
        if step in (1, CONFIG.grid.width - 1, CONFIG.grid.width + 3):
            assert made is None
        else:
            start = step // CONFIG.grid.width * CONFIG.grid.width
            np.testing.assert_array_equal(made, every[start : start + CONFIG.grid.width])


def test_a_greedy_batch_reads_zeros_that_are_made_once() -> None:
    rows = GridRowNoise(IMAGES, CONFIG, is_greedy=True)
    first = rows.reach(0)
    assert first.shape == (CONFIG.grid.width, 2, 10) and not first.any()
    assert rows.reach(CONFIG.grid.width) is None
