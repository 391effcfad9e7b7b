"""Attention of chosen heads in one image, for the plots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ssd_export.cache.replay import DenseAttention
from ssd_export.calibrate.sequences import sequence_of
from ssd_export.config import Grid
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.policy.head_map import HeadMap

LEAST_CONTRAST = 0.25
NUM_BANDS = 3  # of grid rows, one chosen token in each


def most_typical_heads(head_map: HeadMap) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layer, query head) of the least and of the greatest metric."""
    metric = np.asarray(head_map.metric)
    low, high = (
        np.unravel_index(place, metric.shape) for place in (metric.argmin(), metric.argmax())
    )
    return (int(low[0]), int(low[1])), (int(high[0]), int(high[1]))


def bands(grid: Grid) -> list[range]:
    """Equal bands of grid rows: the last one ends a row above the image's edge."""
    height = grid.height // (NUM_BANDS + 1)
    first = grid.height - 1 - NUM_BANDS * height
    return [range(first + i * height, first + (i + 1) * height) for i in range(NUM_BANDS)]


def chosen_tokens(image: np.ndarray, grid: Grid) -> list[int]:
    """The image token of most contrast in the upper, middle and lower part of an image (uint8
    [height, width, 3]); a part with little contrast beside the others has none."""
    size = image.shape[0] // grid.height
    pixels = image.astype(np.float32).reshape(grid.height, size, grid.width, size, 3)
    patches = pixels.std(axis=(1, 3)).sum(axis=-1)
    inner = np.pad(patches[:, 2:-2], ((0, 0), (2, 2)), constant_values=-1)
    contrasts = [inner[rows.start : rows.stop] for rows in bands(grid)]
    enough = LEAST_CONTRAST * max(contrast.max() for contrast in contrasts)
    return [
        grid.width * rows.start + int(contrast.argmax())
        for rows, contrast in zip(bands(grid), contrasts, strict=True)
        if contrast.max() >= enough
    ]


@torch.inference_mode()
def head_attention(
    model: ImageTokenModel,
    prompt: np.ndarray,
    tokens: np.ndarray,
    heads: Sequence[tuple[int, int]],
    queries: Sequence[int],
) -> np.ndarray:
    """float32 [heads, queries, image tokens]: what each query image token of a conditional row
    gives every image token.

    Args: prompt: float32 [L, condition_dim], its embeddings.
    """
    hidden = sequence_of(model, [prompt], tokens)
    start, grid = len(prompt), model.config.grid
    maps = np.zeros((len(heads), len(queries), grid.num_tokens), np.float32)

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        dense = DenseAttention.compute(query, key, value, start, grid)
        for index, (chosen_layer, head) in enumerate(heads):
            if chosen_layer == layer:
                probs = dense.probs.flatten(1, 2)[0, head, start:, start:]
                maps[index, :, : probs.shape[1]] = probs[list(queries)].numpy()
        return dense.out.flatten(1, 2).to(query.dtype)

    model(hidden, torch.arange(hidden.shape[1])[None], attend, start)
    return maps
