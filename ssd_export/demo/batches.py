"""Training batches for the demo model: captions as prompt ids, scenes as image tokens, some inputs spoilt on purpose.

A scene's tokens repeat themselves: what colour a shape has is told by the neighbour already drawn, so a model
that only copies is nearly always right and learns the caption slowly. Two remedies, both gone by the end of the
training: `spoil_paint` gives some *input* tokens another colour or ground (the target stays true, so the caption
is the only reliable source), and `starts` marks the tokens that begin something, which the loss weighs more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ssd_export.demo import codes
from ssd_export.demo.scenes import CATEGORIES, Scene, is_held_out, random_scene
from ssd_export.model.prompt import BEGIN_OF_IMAGE, BOS, PAD

TEMPLATE = "<|User|>: {caption}\n\n<|Assistant|>:"
CAPTION_DROP = 0.1


@dataclass(frozen=True)
class Batch:
    """ids: int64 [B, L] right-padded; lengths: int64 [B]; tokens, inputs: int64 [B, I]; starts: bool [B, I].

    I = 24 x grid rows: a batch may end before the picture does, which changes nothing for a causal model.

    inputs are the tokens as the model sees them, spoilt or not.
    """

    ids: Tensor
    lengths: Tensor
    tokens: Tensor
    inputs: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Mix:
    """What a batch is drawn from: pictures, grid rows, share of each category, how much input is spoilt (0..1)."""

    size: int
    grid_rows: int
    shares: tuple[float, float, float, float]
    spoil: float


class PromptIds:
    """Prompt ids of a caption as Janus builds them; `None` is the unconditional prompt of the same length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos, self._pad, self._boi = (tokenizer.token_to_id(name) for name in (BOS, PAD, BEGIN_OF_IMAGE))

    def __call__(self, caption: str, dropped: bool) -> list[int]:
        middle = self._tokenizer.encode(TEMPLATE.format(caption=caption)).ids
        return [self._bos, *([self._pad] * len(middle) if dropped else middle), self._boi]


def training_scene(rng: np.random.Generator, mix: Mix) -> Scene:
    """A random scene whose caption is not held out."""
    while True:
        scene = random_scene(rng, str(rng.choice(CATEGORIES, p=mix.shares)))
        if not is_held_out(scene.caption):
            return scene


def draw_batch(rng: np.random.Generator, prompt_ids: PromptIds, mix: Mix) -> Batch:
    scenes = [training_scene(rng, mix) for _ in range(mix.size)]
    rows = [prompt_ids(scene.caption, dropped=rng.random() < CAPTION_DROP) for scene in scenes]
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((mix.size, lengths.max()), np.int64)
    for row, line in zip(rows, ids, strict=True):
        line[: len(row)] = row
    tokens = np.stack([codes.encode_scene(scene)[: mix.grid_rows * codes.GRID] for scene in scenes])
    inputs = spoil_paint(rng, tokens, mix.spoil)
    return Batch(*(torch.from_numpy(array) for array in (ids, lengths, tokens, inputs, starts(tokens))))


def spoil_paint(rng: np.random.Generator, tokens: np.ndarray, spoil: float) -> np.ndarray:
    """Tokens [B, I] with wrong colours and grounds in a share `spoil` of the rows, at 0 to 60 % of their places."""
    share = np.where(rng.random(len(tokens)) < spoil, rng.uniform(0, 0.6, len(tokens)), 0.0)
    chosen = rng.random(tokens.shape) < share[:, None]
    pattern, _ = codes.factors()
    colour = rng.integers(0, len(codes.COLOURS), tokens.shape)
    ground = tokens // codes.NUM_GROUNDS * codes.NUM_GROUNDS + rng.integers(0, codes.NUM_GROUNDS, tokens.shape)
    other = np.where(tokens < codes.NUM_GROUND_CODES, ground, codes.code_of(pattern[tokens], colour))
    return np.where(chosen, other, tokens)


def starts(tokens: np.ndarray) -> np.ndarray:
    """Where something begins: the first token, and shape tokens with plain ground on the left and above. bool [B, I]."""
    grid = (tokens >= codes.NUM_GROUND_CODES).reshape(len(tokens), -1, codes.GRID)
    begins = grid.copy()
    begins[:, :, 1:] &= ~grid[:, :, :-1]
    begins[:, 1:] &= ~grid[:, :-1]
    begins[:, 0, 0] = True
    return begins.reshape(tokens.shape)
