"""The neighborhood that a spatial head looks at: the last tokens in grid order, or a patch of
the grid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.config import Grid
from ssd_export.errors import UserError

SPELLING = re.compile(r"([12])d:(\d{1,4})")


@dataclass(frozen=True)
class Neighborhood:
    """1d:N is the N newest image tokens, the query's own included (a grid row and one more reach
    the token one grid row above); 2d:R is every earlier token at most R grid rows and R columns
    away.
    """

    dimensions: int
    size: int

    @classmethod
    def default(cls, grid: Grid) -> Neighborhood:
        """The last two grid rows of image tokens."""
        return cls(1, grid.neighborhood)

    @classmethod
    def parse(cls, text: str, grid: Grid) -> Neighborhood:
        """Parses `1d:TOKENS` or `2d:RADIUS`. Raises: UserError for another spelling, or a size that
        holds nothing or everything.
        """
        match = SPELLING.fullmatch(text)
        usual = cls.default(grid)
        if not match:
            raise UserError(
                f"--neighborhood {text!r} is unknown; use {usual} (the last {usual.size} tokens)"
                " or 2d:1 (3 x 3)"
            )
        dimensions, size = int(match[1]), int(match[2])
        least, largest = (1, grid.num_tokens - 1) if dimensions == 1 else (0, grid.width - 2)
        if not least <= size <= largest:
            raise UserError(
                f"--neighborhood {text}: the size is outside {least}..{largest}; use {usual} or"
                " 2d:1"
            )
        return cls(dimensions, size)

    def __str__(self) -> str:
        return f"{self.dimensions}d:{self.size}"

    def mask(self, num_tokens: int, grid_width: int) -> Tensor:
        """bool [num_tokens, num_tokens]: whether image token k is in the neighborhood of image
        token q, [q, k].

        Later tokens (k > q) are not masked out: causal attention gives them nothing.
        """
        token = torch.arange(num_tokens)
        if self.dimensions == 1:
            return token[:, None] - token[None, :] < self.size
        row, column = token // grid_width, token % grid_width
        near_row = (row[:, None] - row[None, :]).abs() <= self.size
        return near_row & ((column[:, None] - column[None, :]).abs() <= self.size)
