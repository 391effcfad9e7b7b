"""Proof that the cache is compressed: what is allocated, counted on the tensors, against what the
policy promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ssd_export.bundle.graphs import head_groups
from ssd_export.config import ModelConfig
from ssd_export.dtypes import DTYPES
from ssd_export.graph_spec import CacheTensor
from ssd_export.policy.schedule import tokens_evicted
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.runner import InspectableRunner
from ssd_export.verify.checks import Divergence, Rung


def check_compression(
    runner: InspectableRunner, table: PolicyTable, config: ModelConfig, dtype: str, num_images: int
) -> Rung:
    """Rung `compression`, after a prefill: slots of every layer and group as allocated, bytes, the
    budget kept.
    """
    groups, divergence = [], None
    for layer, index, group in head_groups(table):
        shape = runner.read_cache(CacheTensor(layer, index, "key")).shape  # [B, H, S, D]
        groups.append(
            {
                "layer": layer,
                "group": index,
                "heads": shape[1],
                "slots": shape[2],
                "promised": group.num_slots,
            }
        )
        if shape[1:3] != (group.num_heads, group.num_slots) and divergence is None:
            what = (
                f"{shape[1]} heads of {shape[2]} slots are allocated, promised are"
                f" {group.num_heads} of {group.num_slots}"
            )
            divergence = Divergence(what, layer=layer, group=index)
    size, rows = DTYPES[dtype].num_bytes, config.rows_per_image * num_images
    figures: dict[str, Any] = {
        "groups": groups,
        "bytes_allocated": runner.cache_bytes(),
        "bytes_promised": table.cache_bytes(config, size, rows),
        "bytes_full_cache": table.full_cache_bytes(config, size, rows),
        "image_slots_mean": _mean_image_slots(groups, table),
        "budget": table.budget,
        "image_share_of_full_cache": (
            table.image_cache_bytes(config, size, rows)
            / table.full_image_cache_bytes(config, size, rows)
        ),
    }
    return Rung("compression", figures, divergence or _over_promise(figures, table.grid.num_tokens))


def _mean_image_slots(groups: list[dict[str, Any]], table: PolicyTable) -> float:
    heads = sum(group["heads"] for group in groups)
    return sum(group["heads"] * (group["slots"] - table.prompt_slots) for group in groups) / heads


def _over_promise(figures: dict[str, Any], num_tokens: int) -> Divergence | None:
    if figures["bytes_allocated"] != figures["bytes_promised"]:
        return Divergence(
            f"{figures['bytes_allocated']:,} cache bytes are allocated, promised are"
            f" {figures['bytes_promised']:,}"
        )
    allowed = figures["budget"] * num_tokens
    if figures["image_slots_mean"] > allowed + 1e-6:
        return Divergence(
            f"the cache is not compressed: {figures['image_slots_mean']:.1f} image slots a head are"
            f" allocated, budget {figures['budget']:g} allows {allowed:.1f}"
        )
    return None


def check_evicted(
    runner: InspectableRunner, table: PolicyTable, lengths: np.ndarray
) -> tuple[dict[str, Any], Divergence | None]:
    """Compares the evicted tokens of a whole image, written less held, with what R7 says for each
    row.
    """
    held = np.zeros(len(lengths), np.int64)
    for layer, index, _ in head_groups(table):
        held += (runner.read_cache(CacheTensor(layer, index, "position")) >= 0).sum(axis=(1, 2))
    num_heads = sum(group.num_heads for _, _, group in head_groups(table))
    evicted = num_heads * (lengths + table.grid.num_tokens - 1) - held
    promised = [tokens_evicted(table, int(length)) for length in lengths]
    for row, (counted, wanted) in enumerate(zip(evicted.tolist(), promised, strict=True)):
        if counted != wanted:
            return {}, Divergence(
                f"{counted} tokens were evicted, the policy evicts {wanted}", row=row
            )
    return {"tokens_evicted_by_row": evicted.tolist()}, None
