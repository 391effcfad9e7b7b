"""Samples tokens on the host, as export/sampler.py does in a graph: for a pass whose rows are not
the batch's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def draw_tokens(
    logits: np.ndarray, noise: np.ndarray, sampling: Mapping[str, np.ndarray]
) -> np.ndarray:
    """int32 [N]: the codes that win the race. Args: as race_of."""
    return race_of(logits, noise, sampling).argmax(axis=1).astype(np.int32)


def race_of(
    logits: np.ndarray, noise: np.ndarray, sampling: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Numbers of which the sampler takes the arg-max, float32 [N, V], of logits float32 [2 N, V],
    or [N, V] without guidance, and noise float32 [N, V].

    Args: sampling: prompt_batch.sampling_inputs of the images.
    """
    guided = logits
    if len(logits) > len(noise):
        conditional, unconditional = np.split(logits, 2)
        guided = unconditional + sampling["cfg_scale"][:, None] * (conditional - unconditional)
    race = guided + sampling["temperature"][:, None] * noise
    for image, kept in enumerate(sampling["top_k"].tolist()):
        if 0 < kept < guided.shape[1]:
            race[image, guided[image] < np.partition(guided[image], -kept)[-kept]] = -np.inf
    return race
