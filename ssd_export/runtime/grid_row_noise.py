"""The noise that a batch's decode steps read: the rows of one grid row, made when it is reached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssd_export.config import ModelConfig
from ssd_export.noise import GumbelNoise, ImageSeed


class GridRowNoise:
    """Noise float32 [grid width, images, codebook]; step s reads row s mod grid width.

    A greedy batch reads zeros: no token depends on them.
    """

    def __init__(
        self,
        images: Sequence[ImageSeed],
        config: ModelConfig,
        is_greedy: bool = False,
        make: type[GumbelNoise] = GumbelNoise,
    ) -> None:
        self._grid = config.grid
        self._shape = (config.grid.width, len(images), config.codebook_size)
        self._noise = None if is_greedy else make(images, config.codebook_size)
        self._row: int | None = None

    def reach(self, step: int) -> np.ndarray | None:
        """The noise of the step's grid row, a new array, where it is not that of the call
        before.
        """
        row = 0 if self._noise is None else step // self._grid.width
        if row == self._row:
            return None
        self._row = row
        if self._noise is None:
            return np.zeros(self._shape, np.float32)
        return self._noise(range(row * self._grid.width, (row + 1) * self._grid.width))
