"""Grid rows of an image in parallel, as ZipAR decodes them (arXiv 2412.04062): fewer passes, and
other tokens than one at a time.

A grid row begins when the row above has `start` tokens, so a pass takes a token of every row that
is under way. The token before a row's first is then still to come: a copy of its nearest neighbor,
the row's newest token, stands in for it at its true position, and is overwritten in the pass after
the row's last token. Which places a pass takes is known before the first, and is the same for every
image. With a start of the grid's width the tokens are those of single steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ssd_export.bundle.graphs import keeps_rows
from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.noise import GumbelNoise
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from ssd_export.sampling import ZIPAR


class Place(NamedTuple):
    """A place of a pass: the token of `source` goes to position step - 1, and what is sampled is
    token `step` if is_new, else it only replaces a stand-in.
    """

    step: int
    source: int
    is_new: bool


def passes_of(grid: Grid, start: int) -> Iterator[list[Place]]:
    """The places of each pass after the prefill, which samples token 0; new ones first."""
    width, height = grid.width, grid.height
    for number in range(1, (height - 1) * start + width):
        columns = ((row, number - row * start) for row in range(height))
        new = [
            Place(row * width + column, _source(row, column, width, start), True)
            for row, column in columns
            if 0 <= column < width
        ]
        ended, column = divmod(number - width, start)
        replaces = column == 0 and 0 <= ended < height - 1 and start < width
        next_row = (ended + 1) * width
        yield [*new, *([Place(next_row, next_row - 1, False)] if replaces else [])]


def _source(row: int, column: int, width: int, start: int) -> int:
    """The token that is read to sample this one: the one before, or the row above's newest."""
    return row * width - width + min(start, width) - 1 if column == 0 else row * width + column - 1


class ParallelRows:
    """Generates a batch; iterating yields what `loop.decode` yields for grid rows.

    passes: decode passes so far; accepted: tokens that they gave, of all images.
    """

    def __init__(
        self,
        runner: Runner,
        batch: PromptBatch,
        table: PolicyTable,
        start: int,
        codebook_size: int,
    ) -> None:
        """Prepares the passes. Raises: UserError for a start outside the grid, caches that evict or
        rank, or a runner that has no such pass.
        """
        check_rows(runner, table, start)
        self._runner, self._batch, self._grid, self._start = runner, batch, table.grid, start
        self._noise = RowsNoise(batch, table.grid, codebook_size, runner.make_noise)
        self.passes = self.accepted = 0

    def __iter__(self) -> Iterator[range]:
        grid, width = self._grid, self._grid.width
        tokens = np.zeros((self._batch.num_images, grid.num_tokens), np.int32)
        self._runner.prefill(self._batch)
        tokens[:, 0] = self._runner.tokens()[:, 0]
        yield range(1)
        for places in passes_of(grid, self._start):
            steps = np.array([place.step for place in places], np.int64)
            inputs = tokens[:, [place.source for place in places]]
            num_new = sum(place.is_new for place in places)
            sampled = self._runner.decode_rows(steps, inputs, self._noise(steps), num_new)
            tokens[:, steps[:num_new]] = sampled[:, :num_new]
            self.passes, self.accepted = self.passes + 1, self.accepted + sampled[:, :num_new].size
            oldest = int(steps[0])
            if oldest % width == width - 1:
                yield range(max(1, oldest + 1 - width), oldest + 1)


class RowsNoise:
    """Noise of places in several grid rows: a row is made when it begins and kept until it ends."""

    def __init__(
        self,
        batch: PromptBatch,
        grid: Grid,
        codebook_size: int,
        make: type[GumbelNoise] = GumbelNoise,
    ) -> None:
        self._width, self._images = grid.width, batch.num_images
        self._make = None if batch.is_greedy else make(batch.images, codebook_size)
        self._codes = codebook_size
        self._rows: dict[int, np.ndarray] = {}

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """float32 [N, W, V] of the steps int64 [W]; zeros for a greedy batch."""
        if self._make is None:
            return np.zeros((self._images, len(steps), self._codes), np.float32)
        rows = (steps // self._width).tolist()
        for row in set(rows) - self._rows.keys():
            self._rows[row] = self._make(range(row * self._width, (row + 1) * self._width))
        for row in self._rows.keys() - set(rows):
            del self._rows[row]
        columns = (steps % self._width).tolist()
        return np.stack([self._rows[row][column] for row, column in zip(rows, columns)], axis=1)


def check_rows(runner: Runner, table: PolicyTable, start: int) -> None:
    """Returns if grid rows in parallel are something that this runner, these caches and this grid
    have. Raises: UserError with the way out.
    """
    check_whole_caches(table)
    if not 1 <= start <= table.grid.width:
        raise UserError(
            f"{ZIPAR}{start} is outside 1 .. {table.grid.width}, the tokens of a grid row; use"
            f" {ZIPAR}12"
        )
    if runner.no_rows:
        raise UserError(runner.no_rows)


def check_whole_caches(table: PolicyTable) -> None:
    """Returns if the caches keep everything. Raises: UserError with the way out."""
    if not keeps_rows(table):
        raise UserError(
            f"--lookahead {ZIPAR}S needs caches that keep everything, and policy {table.name} at"
            f" {table.budget:g} evicts or ranks: with rows in parallel the newest tokens are not"
            " those before a token, and a stand-in would be ranked as one; export with --policy"
            " full, or use --lookahead auto, which has the same tokens as off"
        )
