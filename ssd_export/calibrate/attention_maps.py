"""Attention of chosen heads in one picture, for the plots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ssd_export.cache.replay import DenseAttention
from ssd_export.calibrate.generate import sequence_of
from ssd_export.config import GRID, NUM_IMAGE_TOKENS
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.policy.head_map import HeadMap

LEAST_CONTRAST = 0.25
BANDS = ((5, 11), (11, 17), (17, 23))  # grid rows, one chosen token in each


def most_typical_heads(head_map: HeadMap) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layer, query head) of the least and of the greatest metric."""
    metric = np.asarray(head_map.metric)
    low, high = (
        np.unravel_index(place, metric.shape) for place in (metric.argmin(), metric.argmax())
    )
    return (int(low[0]), int(low[1])), (int(high[0]), int(high[1]))


def chosen_tokens(picture: np.ndarray) -> list[int]:
    """The image token of most contrast in the upper, middle and lower part of a picture (uint8
    [size, size, 3]); a part with little contrast beside the others has none."""
    size = picture.shape[0] // GRID
    patches = (
        picture.astype(np.float32).reshape(GRID, size, GRID, size, 3).std(axis=(1, 3)).sum(axis=-1)
    )
    inner = np.pad(patches[:, 2:-2], ((0, 0), (2, 2)), constant_values=-1)
    enough = LEAST_CONTRAST * inner[BANDS[0][0] : BANDS[-1][1]].max()
    return [
        GRID * first + int(inner[first:last].argmax())
        for first, last in BANDS
        if inner[first:last].max() >= enough
    ]


@torch.inference_mode()
def head_attention(
    model: ImageTokenModel,
    ids: np.ndarray,
    tokens: np.ndarray,
    heads: Sequence[tuple[int, int]],
    queries: Sequence[int],
) -> np.ndarray:
    """float32 [heads, queries, 576]: what each query image token of a conditional row gives every
    image token.
    """
    hidden = sequence_of(model, [ids], tokens)
    start = len(ids)
    maps = np.zeros((len(heads), len(queries), NUM_IMAGE_TOKENS), np.float32)

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        dense = DenseAttention.compute(query, key, value, start)
        for index, (chosen_layer, head) in enumerate(heads):
            if chosen_layer == layer:
                probs = dense.probs.flatten(1, 2)[0, head, start:, start:]
                maps[index, :, : probs.shape[1]] = probs[list(queries)].numpy()
        return dense.out.flatten(1, 2).to(query.dtype)

    model(hidden, torch.arange(hidden.shape[1])[None], attend)
    return maps
