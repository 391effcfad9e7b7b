"""Types of the heads from the first tokens of one image, and how far images agree on them.

Source: HeadKV (arXiv 2605.20600): after 100 tokens a head is local if the newest tokens that hold
0.9 of its attention are fewer than the window. That is a metric of at most 0.1 for a neighborhood
of the window's size. Ours differs in that the attention is that of all tokens which have something
outside the neighborhood, not of one, and on image tokens alone, as everywhere in a head map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_export.cache.replay import DenseAttention
from ssd_export.calibrate.calibration import BATCH, rows_of
from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.calibrate.prompts import hash_of_prompts
from ssd_export.calibrate.ranks import rank_correlation
from ssd_export.calibrate.sequences import FullCacheImages, ImagesSpec, sequence_of
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import prompt_encoder
from ssd_export.policy.head_map import HeadMap
from ssd_export.runtime.loop import single_steps

NUM_TOKENS = 100
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Agreement:
    """Agreement of the map of one image with a map of many.

    same_type: share of the KV heads with one type in both, each by its own threshold;
    same_type_at_share: the same, were as many heads semantic here as there; rank_correlation: of
    the KV heads' metrics.
    """

    same_type: float
    same_type_at_share: float
    rank_correlation: float

    @classmethod
    def of(cls, online: HeadMap, offline: HeadMap) -> Agreement:
        """Compares two maps of one model."""
        as_many = online.with_semantic_share(offline.semantic_share)
        metrics = (np.asarray(each.kv_metric()) for each in (online, offline))
        return cls(
            same_type(online, offline), same_type(as_many, offline), rank_correlation(*metrics)
        )


@dataclass(frozen=True)
class AgreementOfImages:
    """Agreement of every two images: share of the KV heads with one type in both; of all heads, the
    share with one type in every image.
    """

    mean: float
    least: float
    always_same: float

    @classmethod
    def of(cls, maps: Sequence[HeadMap]) -> AgreementOfImages | None:
        """Compares two or more maps of one model; None for a single one."""
        shares = [same_type(first, second) for first, second in combinations(maps, 2)]
        if not shares:
            return None
        types = np.array([each.semantic() for each in maps])
        always = (types == types[0]).all(axis=0).mean()
        return cls(float(np.mean(shares)), min(shares), float(always))


def same_type(first: HeadMap, second: HeadMap) -> float:
    """Share of the KV heads with one type in both maps, 0..1."""
    return float((np.asarray(first.semantic()) == np.asarray(second.semantic())).mean())


def type_online(
    checkpoint: Checkpoint,
    model: ImageTokenModel,
    spec: ImagesSpec,
    *,
    threshold: float,
    tool_version: str,
    progress: Progress = lambda stage, done, total: None,
) -> list[HeadMap]:
    """The head map of each image, by its first tokens alone; without costs.

    Raises: UserError for prompts that do not fit, or a neighborhood that holds all these tokens.
    """
    config = checkpoint.config
    num_tokens = min(NUM_TOKENS, config.grid.num_tokens)
    queries = _queries(spec.neighborhood, num_tokens - 1, config.grid.width)
    encoder = prompt_encoder(config, checkpoint.file)
    images = FullCacheImages(model, encoder, spec.prompt_slots)
    encoder.encode(spec.prompts, spec.prompt_slots)
    empty = HeadMap(
        config.family,
        config.grid,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.hidden_size,
        metric=(),
        threshold=threshold,
        neighborhood=str(spec.neighborhood),
        provenance=f"typed by ssd-export calibrate --online: first {num_tokens} tokens of an image",
        prompts_hash=hash_of_prompts(spec.prompts[:1]),
        model_fingerprint=checkpoint.fingerprint(),
        tool_version=tool_version,
    )
    maps: list[HeadMap] = []
    for start in range(0, spec.num_images, BATCH):
        progress("typing heads", start, spec.num_images)
        numbers = range(start, min(start + BATCH, spec.num_images))
        prompts = [spec.prompts[number % len(spec.prompts)] for number in numbers]
        batch = images.batches(prompts, spec.sampling, spec.seed, start)
        tokens = images(batch, single_steps(num_tokens))[:, :num_tokens]
        for place in range(len(numbers)):
            rows = rows_of(batch, place, spec.sampling)
            metric = _metric(model, rows, tokens[place], spec.neighborhood, queries)
            maps.append(replace(empty, metric=_rows(metric)).validate())
    progress("typing heads", spec.num_images, spec.num_images)
    return maps


def with_agreement(
    head_map: HeadMap,
    spec: ImagesSpec,
    offline: Agreement | None,
    images: AgreementOfImages | None,
) -> HeadMap:
    """The map with where it comes from and what was compared, as its statistics."""
    statistics: dict[str, Any] = {
        "num_images": 1,
        "num_tokens": min(NUM_TOKENS, head_map.grid.num_tokens),
        "seed": spec.seed,
        "prompt_slots": spec.prompt_slots,
        "cfg_scale": spec.sampling.cfg_scale,
        "temperature": spec.sampling.temperature,
    }
    if offline is not None:
        statistics["agreement_with_offline"] = vars(offline)
    if images is not None:
        statistics["agreement_of_images"] = {"num_images": spec.num_images, **vars(images)}
    return replace(head_map, statistics=statistics)


def _queries(neighborhood: Neighborhood, num_tokens: int, grid_width: int) -> Tensor:
    """bool [num_tokens]: the image tokens that see another outside their neighborhood.

    Raises: UserError where there is none.
    """
    outside = ~neighborhood.mask(num_tokens, grid_width)
    queries = outside.tril().any(dim=1)
    if not queries.any():
        raise UserError(
            f"--neighborhood {neighborhood} holds all of the first {num_tokens} tokens, so none"
            " tells types apart; use a smaller one, or leave --online out"
        )
    return queries


@torch.inference_mode()
def _metric(
    model: ImageTokenModel,
    prompts: Sequence[np.ndarray],
    tokens: np.ndarray,
    neighborhood: Neighborhood,
    queries: Tensor,
) -> np.ndarray:
    """float64 [layers, heads]: share of the queries' attention on image tokens that is outside the
    neighborhood, mean over the image's rows.

    Args: prompts: embeddings of its rows, as `rows_of` gives them; tokens int [tokens]; queries:
    bool [tokens - 1].
    """
    config, start = model.config, len(prompts[0])
    far = ~neighborhood.mask(len(queries), config.grid.width)[queries]
    metric = np.zeros((config.num_layers, config.num_heads))

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dense = DenseAttention.compute(query, key, value, start, config.grid)
        probs = dense.probs.flatten(1, 2)[:, :, start:, start:][:, :, queries].double()
        outside = probs.masked_fill(~far, 0).sum(dim=(2, 3))
        metric[layer] = (outside / probs.sum(dim=(2, 3))).mean(dim=0).numpy()
        return dense.out.flatten(1, 2).to(query.dtype)

    hidden = sequence_of(model, prompts, tokens)
    model(hidden, torch.arange(hidden.shape[1])[None], attend, start)
    return np.clip(metric, 0, 1)


def _rows(metric: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{value:.7g}") for value in layer) for layer in metric)
