"""Similarity of images, tokens and distributions to those of the full cache: for models whose
images have no score.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ssd_export.metrics.teacher_forced import Progress, Sequences, TeacherForced
from ssd_export.policy.table import PolicyTable

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # Wang et al. 2004: an 11 x 11 Gaussian window
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
SAME_PSNR = 100.0  # dB, stands for no difference at all


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; at most SAME_PSNR."""
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return min(SAME_PSNR, 10 * math.log10(255**2 / error)) if error else SAME_PSNR


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two uint8 images [height, width, 3], mean over channels and
    places.
    """
    x, y = image.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    below = (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    return float((above / below).mean())


def _blurred(values: np.ndarray) -> np.ndarray:
    """The Gaussian mean of every place where the window fits."""
    weights = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for _ in range(2):  # each axis in turn
        size = values.shape[0] - 2 * SSIM_RADIUS
        values = sum(w * values[i : i + size] for i, w in enumerate(weights)).swapaxes(0, 1)
    return values


def token_agreement(tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Share of equal tokens of each image, float64 [N]. An image that once differs stays
    different: 1 is rare.
    """
    return (tokens == reference).mean(axis=1)


def kl_to_full_cache(
    model: TeacherForced,
    sequences: Sequences,
    table: PolicyTable,
    cfg_scale: float,
    progress: Progress = lambda stage, done, total: None,
) -> np.ndarray:
    """KL(full || policy) in nats per token of each image, float64 [N]: of the guided
    distributions at temperature 1, for the tokens given.

    Args: sequences: with unconditional rows.
    """
    full = model.hidden(sequences, None)
    policy = model.hidden(sequences, table, progress)
    num_images = len(full) // model.config.rows_per_image
    return np.array(
        [
            _kl(*(_guided(model, hidden[i::num_images], cfg_scale) for hidden in (full, policy)))
            for i in range(num_images)
        ]
    )


@torch.inference_mode()
def _guided(model: TeacherForced, hidden: Tensor, cfg_scale: float) -> Tensor:
    """Log-probabilities [I, V] of one image of I tokens; hidden [1 or 2, I, hidden size]: its
    conditional and, with guidance, its unconditional row.
    """
    logits = model.model.image_logits(hidden).float()
    if len(logits) == 1:
        return logits[0].log_softmax(dim=-1)
    conditional, unconditional = logits
    return (unconditional + cfg_scale * (conditional - unconditional)).log_softmax(dim=-1)


def _kl(full: Tensor, policy: Tensor) -> float:
    return float((full.exp() * (full - policy)).sum(dim=-1).double().mean())
