"""Several tokens of an image in one pass, and the same tokens as one at a time.

Drafts stand for tokens that are still to come; a pass samples every position with its own noise,
and a token counts while all drafts before it were right. So the tokens are those of single steps,
up to near ties that a pass of several tokens rounds differently. Every image goes at its own pace;
a pass ends where an eviction is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.noise import GumbelNoise
from ssd_export.plan.lookahead import OFF, AutoWindow
from ssd_export.policy.schedule import rooms
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner

NONE_YET = -1
WINNER, PREVIOUS, ABOVE, LEFT = "winner", "previous", "above", "left"
DRAFTS = (WINNER, PREVIOUS, ABOVE, LEFT)
ONE_TOKEN = np.ones(1, np.int64)
MEMORY = 0.8  # of how often a source of drafts was right: about the last five tokens count


class Lookahead:
    """Generates a batch; iterating yields what `loop.decode` yields for grid rows.

    passes: decode passes so far, single steps among them; accepted: tokens that they gave, of all
    images.
    """

    def __init__(
        self,
        runner: Runner,
        batch: PromptBatch,
        table: PolicyTable,
        window: int | AutoWindow,
        codebook_size: int,
        draft: str = WINNER,
    ) -> None:
        """Prepares the passes of a batch. Args: window: the most tokens of a pass, or what chooses
        them for one image; draft: one of DRAFTS. Raises UserError where the runner has no such
        pass, or the window is out of range.
        """
        if runner.no_window:
            raise UserError(runner.no_window)
        most = table.grid.num_tokens
        widest = window if isinstance(window, int) else min(max(window.windows), most)
        if not 2 <= widest <= most:
            raise UserError(f"a window of {widest} tokens is outside 2 .. {most}; use 8")
        self._runner, self._batch, self._grid, self._window = runner, batch, table.grid, window
        lengths = batch.lengths.reshape(-1, batch.num_images).T.tolist()
        done = [0]  # after the last step
        self._rooms = np.array([rooms(table, own) + done for own in lengths], np.int64)
        self._noise = WindowNoise(batch, table.grid, widest, codebook_size, runner.make_noise)
        self._drafts = Drafts(batch.num_images, table.grid, draft)
        self.passes = self.accepted = 0

    def __iter__(self) -> Iterator[range]:
        grid, num_images = self._grid, self._batch.num_images
        self._runner.prefill(self._batch)
        yield range(1)
        first = np.zeros(num_images, np.int64)  # the next step of each image
        first += self._drafts.sampled(first, self._runner.tokens()[:, :1], np.ones_like(first))
        for row in range(grid.height):
            end = (row + 1) * grid.width
            while min(first.tolist()) < end:
                first += self._pass(first)
            yield range(max(1, row * grid.width), end)

    def _pass(self, first: np.ndarray) -> np.ndarray:
        """Runs one pass; the number of tokens that each image gained."""
        window = self._window if isinstance(self._window, int) else self._window(int(first[0]))
        if window == OFF:
            return self._step(first)
        rooms_here = self._rooms[np.arange(len(first)), first]
        limit = np.minimum(rooms_here, window)
        width = int(limit.max())
        inputs = self._drafts.inputs(first, width)
        noise = partial(self._noise, first, width)
        sampled, counts = self._runner.decode_window(first, limit, inputs, noise)
        self.passes, self.accepted = self.passes + 1, self.accepted + int(counts.sum())
        if isinstance(self._window, AutoWindow):
            self._window.drafts(int(counts[0]) - 1, int(counts[0] < limit[0]))
        return self._drafts.sampled(first, sampled, counts)

    def _step(self, first: np.ndarray) -> np.ndarray:
        """A decode step of the one image; its draft is compared with what is sampled, too."""
        assert isinstance(self._window, AutoWindow) and len(first) == 1
        step = int(first[0])
        draft = self._drafts.guess(0, step)
        self._runner.evict(step)
        self._runner.decode_step(step)
        token = int(self._runner.tokens()[0, step])
        self.passes, self.accepted = self.passes + 1, self.accepted + 1
        self._window.drafts(int(token == draft), int(token != draft))
        self._drafts.took(0, step, token)
        return ONE_TOKEN


class Drafts:
    """Guesses of the tokens that are still to come, for every image.

    A position has up to three guesses: what the pass before sampled there, the token above, and the
    left neighbor. The draft is the winner, the one that has been right more often lately in this
    image, or always the same one; where a position has not that one, the left neighbor.
    """

    def __init__(self, num_images: int, grid: Grid, draft: str = WINNER) -> None:
        self._width, self._num_tokens, self._draft = grid.width, grid.num_tokens, draft
        self._tokens = [[NONE_YET] * grid.num_tokens for _ in range(num_images)]
        self._previous = [[NONE_YET] * grid.num_tokens for _ in range(num_images)]
        self._right: list[dict[str, float]] = [
            dict.fromkeys((PREVIOUS, ABOVE, LEFT), 0.0) for _ in range(num_images)
        ]

    def sampled(self, first: np.ndarray, sampled: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Takes what a pass sampled, [N, W] from step first on: the first counts of them are
        tokens, the others guesses. Returns the counts.
        """
        for image, (start, samples, count) in enumerate(
            zip(first.tolist(), sampled.tolist(), counts.tolist(), strict=True)
        ):
            for step, token in enumerate(samples[:count], start):
                self.took(image, step, token)
            end = min(start + len(samples), self._num_tokens)
            self._previous[image][start + count : end] = samples[count : end - start]
        return counts

    def took(self, image: int, step: int, token: int) -> None:
        """Takes the token of an image's next step."""
        tokens, right = self._tokens[image], self._right[image]
        for source, guess in self._guesses(image, step, tokens).items():
            right[source] = MEMORY * right[source] + (1 - MEMORY) * (guess == token)
        tokens[step] = token

    def guess(self, image: int, step: int) -> int:
        """The draft of an image's next step."""
        return self._best(image, self._guesses(image, step, self._tokens[image]))

    def inputs(self, first: np.ndarray, width: int) -> np.ndarray:
        """int32 [N, W]: the token before each image's step, then drafts of those from it on; of an
        image that is done, the token that was written last.
        """
        inputs = np.zeros((len(first), width), np.int32)
        for image, start in enumerate(first.tolist()):
            tokens = self._tokens[image]
            if start == self._num_tokens:
                inputs[image] = tokens[-2]
                continue
            end = min(start + width - 1, self._num_tokens)
            for step in range(start, end):  # a draft stands where its token will
                tokens[step] = self._best(image, self._guesses(image, step, tokens))
            inputs[image, : end - start + 1] = tokens[start - 1 : end]
        return inputs

    def _guesses(self, image: int, step: int, tokens: list[int]) -> dict[str, int]:
        """Guesses that a position has; tokens: of all positions before it."""
        found = {}
        if step >= 1:
            found[LEFT] = tokens[step - 1]
        if step >= self._width:
            found[ABOVE] = tokens[step - self._width]
        if self._previous[image][step] != NONE_YET:
            found[PREVIOUS] = self._previous[image][step]
        return found

    def _best(self, image: int, guesses: dict[str, int]) -> int:
        if self._draft != WINNER:
            return guesses.get(self._draft, guesses[LEFT])
        right = self._right[image]
        return guesses[max(guesses, key=lambda source: right[source])]


class WindowNoise:
    """Noise of windows that begin at each image's own step, made a grid row at a time and kept in a
    ring of as many rows as a window can touch.
    """

    def __init__(
        self,
        batch: PromptBatch,
        grid: Grid,
        window: int,
        codebook_size: int,
        make: type[GumbelNoise] = GumbelNoise,
    ) -> None:
        self._grid, self._num_rows = grid, 1 + -(-(window - 1) // grid.width)
        self._images = [make([image], codebook_size) for image in batch.images]
        self._next_row = [0] * batch.num_images
        self._is_greedy = batch.is_greedy
        steps = window if batch.is_greedy else self._num_rows * grid.width
        self._ring = np.zeros((batch.num_images, steps, codebook_size), np.float32)

    def __call__(self, first: np.ndarray, width: int) -> np.ndarray:
        """float32 [N, width, V] of each image's steps from `first` on; zeros for a greedy batch."""
        if self._is_greedy:
            return self._ring[:, :width]
        for image, start in enumerate(first.tolist()):
            self._reach(image, start + width - 1)
        size = self._ring.shape[1]
        if len(first) == 1 and (start := int(first[0]) % size) + width <= size:
            return self._ring[:, start : start + width]
        steps = (first[:, None] + np.arange(width)) % size
        return self._ring[np.arange(len(first))[:, None], steps]

    def _reach(self, image: int, step: int) -> None:
        """Makes the rows of an image up to that of a step."""
        width, last = self._grid.width, min(step // self._grid.width, self._grid.height - 1)
        for row in range(self._next_row[image], last + 1):
            start = row % self._num_rows * width
            noise = self._images[image](range(row * width, (row + 1) * width))
            self._ring[image, start : start + width] = noise[:, 0]
            self._next_row[image] = row + 1
