"""Training batches for the demo model: captions as prompt ids, scenes as image tokens, with gaps
and spoilt on purpose.

A scene's tokens repeat themselves: what color a shape has is told by the neighbor already drawn,
so a model that only copies is nearly always right and learns the caption slowly. Three remedies:
`choose_places` leaves most of the plain ground out of the sequence, so that three times as many
captions are seen in the same time; `spoil_paint` gives some *input* tokens another color or ground
(the target stays true, so the caption is the only reliable source); `codes.caption_tokens` marks
the tokens that only the caption tells, which the loss weighs more. The first two are gone by the
end of the training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ssd_export.demo import codes
from ssd_export.demo.scenes import CATEGORIES, Scene, is_held_out, random_scene
from ssd_export.model.families import janus
from ssd_export.model.prompt import TemplateEncoder

CAPTION_DROP = 0.1
PROMPT_SLOTS = 64  # as export reserves by default: a longer caption could not be generated


@dataclass(frozen=True)
class Batch:
    """A training batch. ids: int64 [B, L] right-padded prompts; lengths: int64 [B].

    places: int64 [B, K], the image tokens that are in the sequence, ascending; inputs: int64 [B,
    K], those tokens as the model sees them, spoilt or not; targets: int64 [B, K + 1], the first
    token of the image and what follows each place;
    weights: float32 [B, K + 1], how many tokens of the image each target stands for; telling:
    bool [B, K + 1], the targets that only the caption tells.
    """

    ids: Tensor
    lengths: Tensor
    places: Tensor
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    telling: Tensor


@dataclass(frozen=True)
class Mix:
    """Composition of a batch: images, kept places an image, share of each category, how much input
    is spoilt (0..1).
    """

    size: int
    num_places: int
    shares: tuple[float, float, float, float]
    spoil: float


class PromptIds:
    """Prompt ids of a caption, as they are when it is generated; dropped: the unconditional prompt
    of the same length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = TemplateEncoder(json.loads(tokenizer.to_str()), janus.PROMPT)

    def __call__(self, caption: str, dropped: bool) -> list[int]:
        """Token ids of a caption, or of the unconditional prompt of the same length."""
        return self._encoder.encode([caption], PROMPT_SLOTS).ids[int(dropped)].tolist()


def training_scene(rng: np.random.Generator, mix: Mix) -> Scene:
    """A random scene whose caption is not held out."""
    while True:
        scene = random_scene(rng, str(rng.choice(CATEGORIES, p=mix.shares)))
        if not is_held_out(scene.caption):
            return scene


def draw_batch(
    rng: np.random.Generator, prompt_ids: Callable[[str, bool], list[int]], mix: Mix
) -> Batch:
    """A training batch of captions and scenes in the shares of the mix.

    Args: prompt_ids: of a caption, and whether it is dropped.
    """
    scenes = [training_scene(rng, mix) for _ in range(mix.size)]
    rows = [prompt_ids(scene.caption, rng.random() < CAPTION_DROP) for scene in scenes]
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((mix.size, lengths.max()), np.int64)
    for row, line in zip(rows, ids, strict=True):
        line[: len(row)] = row
    tokens = np.stack([codes.encode_scene(scene) for scene in scenes])
    places, weights = choose_places(rng, tokens, mix.num_places)
    inputs = np.take_along_axis(spoil_paint(rng, tokens, mix.spoil), places, axis=1)
    follow = np.concatenate([np.zeros_like(places[:, :1]), places + 1], axis=1)
    telling = np.stack([codes.caption_tokens(scene) for scene in scenes])
    targets, telling = (np.take_along_axis(each, follow, axis=1) for each in (tokens, telling))
    return Batch(
        *(
            torch.from_numpy(array)
            for array in (ids, lengths, places, inputs, targets, weights, telling)
        )
    )


def choose_places(
    rng: np.random.Generator, tokens: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places that stay in the sequence, int64 [B, count] ascending, and the targets' weights,
    float32 [B, count + 1].

    Shapes, what stands before them and the first column stay, or where they are more than `count` a
    random part of them; then a random part of the rest. What stays stands for what was left out of
    its kind. Positions remain the true ones, so a sequence with gaps is what an evicting cache
    shows the model.
    """
    last = tokens.shape[1] - 1
    shape = tokens >= codes.NUM_GROUND_CODES
    kept = shape[:, :last] | shape[:, 1:]
    kept[:, :: codes.GRID] = True
    order = np.argsort(rng.random(kept.shape) - kept, axis=1)[:, :count]
    order.sort(axis=1)
    num_kept = kept.sum(axis=1, keepdims=True)
    num_chosen = np.minimum(num_kept, count)
    each_kept, each_other = (
        num_kept / num_chosen,
        (last - num_kept) / np.maximum(count - num_chosen, 1),
    )
    stands_for = np.where(np.take_along_axis(kept, order, axis=1), each_kept, each_other)
    return order, np.concatenate([np.ones_like(stands_for[:, :1]), stands_for], axis=1).astype(
        np.float32
    )


def spoil_paint(rng: np.random.Generator, tokens: np.ndarray, spoil: float) -> np.ndarray:
    """Tokens [B, I] with wrong colors and grounds in a share `spoil` of the rows, at 0 to 60 % of
    their places.
    """
    share = np.where(rng.random(len(tokens)) < spoil, rng.uniform(0, 0.6, len(tokens)), 0.0)
    chosen = rng.random(tokens.shape) < share[:, None]
    pattern, _ = codes.factors()
    color = rng.integers(0, len(codes.COLORS), tokens.shape)
    ground = tokens // codes.NUM_GROUNDS * codes.NUM_GROUNDS + rng.integers(
        0, codes.NUM_GROUNDS, tokens.shape
    )
    other = np.where(tokens < codes.NUM_GROUND_CODES, ground, codes.code_of(pattern[tokens], color))
    return np.where(chosen, other, tokens)
