"""Several tokens of an image in one pass, and the same tokens as one at a time.

Drafts stand for tokens that are still to come; a pass draws every position with its own noise, and
a draw counts while all drafts before it were right. So the tokens are those of single steps, up to
near ties that a pass of several tokens rounds differently. Every image goes at its own pace.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.noise import GumbelNoise
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner

NONE_YET = -1


class Lookahead:
    """Generates a batch; iterating yields what `loop.decode` yields for grid rows.

    passes: decode passes so far; accepted: tokens that they drew, of all images.
    """

    def __init__(
        self,
        runner: Runner,
        batch: PromptBatch,
        table: PolicyTable,
        window: int,
        codebook_size: int,
    ) -> None:
        """Raises: UserError where the runner has no such pass, or the window is out of range."""
        if runner.max_window < 2:
            raise UserError(
                "this runner draws one token a pass; use --runner torch, or --lookahead off"
            )
        if not 2 <= window <= runner.max_window:
            raise UserError(
                f"a window of {window} tokens is outside 2 .. {runner.max_window}; use 16"
            )
        self._runner, self._batch, self._grid, self._window = runner, batch, table.grid, window
        self._noise = _NoiseRows(batch, table.grid, codebook_size)
        self._drafts = Drafts(batch.num_images, table.grid)
        self.passes = self.accepted = 0

    def __iter__(self) -> Iterator[range]:
        grid, images = self._grid, np.arange(self._batch.num_images)
        self._runner.prefill(self._batch)
        yield range(1)
        first = np.ones(len(images), np.int64)  # the next step of each image
        self._drafts.known(self._runner.tokens(), first)
        for row in range(grid.height):
            end = (row + 1) * grid.width
            while first.min() < end:
                steps = np.minimum(first[:, None] + np.arange(self._window), grid.num_tokens - 1)
                inputs = self._drafts.inputs(first, self._window)
                drawn, counts = self._runner.decode_window(first, inputs, self._noise(steps))
                self._drafts.drawn(first, drawn)
                first = first + counts
                self._drafts.known(self._runner.tokens(), first)
                self.passes, self.accepted = self.passes + 1, self.accepted + int(counts.sum())
            yield range(max(1, row * grid.width), end)


class Drafts:
    """Guesses of the tokens that are still to come, for every image.

    A position's guess is what the pass before drew there; else the token above or the left
    neighbor, whichever has been right more often in this image.
    """

    def __init__(self, num_images: int, grid: Grid) -> None:
        self._grid = grid
        self._tokens = np.full((num_images, grid.num_tokens), NONE_YET, np.int32)
        self._first = np.zeros(num_images, np.int64)
        self._above_wins = np.zeros(num_images, np.int64)  # less the left neighbor's

    def known(self, tokens: np.ndarray, first: np.ndarray) -> None:
        """Takes the tokens of each image before its step first."""
        width = self._grid.width
        for image, (start, end) in enumerate(zip(self._first, first, strict=True)):
            self._tokens[image, start:end] = tokens[image, start:end]
            steps = np.arange(max(int(start), width), int(end))
            row = self._tokens[image]
            above, left = row[steps] == row[steps - width], row[steps] == row[steps - 1]
            self._above_wins[image] += int(above.sum()) - int(left.sum())
        self._first = first.copy()

    def drawn(self, first: np.ndarray, drawn: np.ndarray) -> None:
        """Keeps what a pass drew, [N, W] from step first on, as guesses."""
        for image, start in enumerate(first):
            end = min(start + drawn.shape[1], self._grid.num_tokens)
            self._tokens[image, start:end] = drawn[image, : end - start]

    def inputs(self, first: np.ndarray, window: int) -> np.ndarray:
        """int32 [N, W]: the token before each image's step, then guesses of those that follow."""
        inputs = np.zeros((len(first), window), np.int32)
        for image, start in enumerate(first):
            for place in range(window):
                step = min(start - 1 + place, self._grid.num_tokens - 1)
                inputs[image, place] = self._guess(image, step)
        return inputs

    def _guess(self, image: int, step: int) -> int:
        row = self._tokens[image]
        if row[step] == NONE_YET:
            takes_above = step >= self._grid.width and self._above_wins[image] >= 0
            row[step] = row[step - (self._grid.width if takes_above else 1)]
        return int(row[step])


class _NoiseRows:
    """Noise of steps that differ between images, made a grid row at a time and kept while
    needed.
    """

    def __init__(self, batch: PromptBatch, grid: Grid, codebook_size: int) -> None:
        self._width, self._codes = grid.width, codebook_size
        self._images = [GumbelNoise([image], codebook_size) for image in batch.images]
        self._is_greedy = batch.is_greedy
        self._rows: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """float32 [W, N, V] of steps [N, W]."""
        noise = np.zeros((*steps.T.shape, self._codes), np.float32)
        if self._is_greedy:
            return noise
        for image, wanted in enumerate(steps):
            needed = {(image, int(row)) for row in np.unique(wanted // self._width)}
            for key in [key for key in self._rows if key[0] == image and key not in needed]:
                del self._rows[key]
            for _, row in sorted(needed - self._rows.keys()):
                start = row * self._width
                self._rows[image, row] = self._images[image](range(start, start + self._width))[
                    :, 0
                ]
            for place, step in enumerate(wanted.tolist()):
                row, column = divmod(step, self._width)
                noise[place, image] = self._rows[image, row][column]
        return noise
