"""Sums over images of what is measured of every head: memory does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ssd_export.cache.replay import DenseAttention
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.config import ModelConfig


@dataclass
class HeadSums:
    """Sums over images (each the mean over its rows), float64.

    metric: [2, layers, heads], of the prompts with an even and with an odd index; num_images:
    [2];
    prompt_share: [layers, heads], mass on the prompt; column_share: [layers, heads, columns], of
    the mass on image tokens; divergence: [layers, KV heads, options], as Ablation or Fisher give
    it.
    """

    metric: np.ndarray
    num_images: np.ndarray
    prompt_share: np.ndarray
    column_share: np.ndarray
    divergence: np.ndarray

    @classmethod
    def zero(cls, config: ModelConfig, num_options: int) -> HeadSums:
        """Sums over no image."""
        heads = (config.num_layers, config.num_heads)
        return cls(
            np.zeros((2, *heads)),
            np.zeros(2),
            np.zeros(heads),
            np.zeros((*heads, config.grid.width)),
            np.zeros((config.num_layers, config.num_kv_heads, num_options)),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums by field name, as they are saved."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def total(self) -> float:
        """Number of images summed."""
        return float(self.num_images.sum())

    def costs(self) -> np.ndarray:
        """[layers, KV heads, options]: mean over images, in nats per image token; what one head
        alone causes.

        Where errors of different heads have nothing to do with each other, their divergences add
        up.
        """
        return self.divergence / self.total

    def mean_metric(self) -> np.ndarray:
        """Mean metric over images, float64 [layers, heads]."""
        return self.metric.sum(axis=0) / self.total


def attention_shares(
    dense: DenseAttention, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the rows of an image: metric [heads], share on the prompt [heads], by grid column
    [heads, columns].

    metric = mass of all image queries on image tokens outside the neighborhood / on all image
    tokens.
    """
    start, width = dense.prompt_length, dense.grid.width
    probs = dense.probs[:, :, :, start:].flatten(1, 2)  # [B, heads, I, T]
    image = probs[..., start:]
    near = neighborhood.mask(dense.num_image_tokens, width).to(image.device)
    mass = image.sum(dim=2, dtype=torch.float64)  # [B, heads, image key]
    total = mass.sum(dim=-1)
    outside = image.masked_fill(near, 0).sum(dim=(2, 3), dtype=torch.float64)
    columns = (
        torch.nn.functional.pad(mass, (0, -mass.shape[-1] % width))
        .unflatten(-1, (-1, width))
        .sum(dim=-2)
    )
    on_prompt = probs[..., :start].sum(dim=(2, 3), dtype=torch.float64) / dense.num_image_tokens
    return (
        (outside / total).mean(dim=0),
        on_prompt.mean(dim=0),
        (columns / total[..., None]).mean(dim=0),
    )
