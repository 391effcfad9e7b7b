"""The decode step of all head groups of a layer as one Triton kernel, R3 to R7 (defined in
policy/__init__.py), caches written in place; where there are fewer heads than the GPU has room for,
as the two of split_attention.

One program serves one (row, KV head) with all its query heads: it finds the slot of the new token,
evicting first if there is none, writes the token, attends and adds to the scores. Programs share
nothing, so rows and heads may be full at different steps. Rules, sizes and caches of the groups
arrive as arguments, of which a program chooses its own group's: one compiled image serves every
policy and every number of query heads; only dtype and head_dim are compiled in.

Scores need the finished softmax: a group that ranks by score leaves its logits in a workspace and
reads them again, 4 bytes a slot, instead of the keys. Query heads that share a KV head follow one
another and read out of the caches of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.kernels.constants import NUM_WARPS, constants, splits
from ssd_export.kernels.head_step import decode_head
from ssd_export.kernels.layer_groups import (
    NUMBERS,
    LayerNumbers,
    caches_of,
    check_group,
    first_slot_of,
    group_of,
    of_group,
)
from ssd_export.kernels.split_attention import launch_split
from ssd_export.policy.layout import group_slices, query_slices
from ssd_export.policy.presets import MAX_GROUPS
from ssd_export.policy.table import GroupPolicy


def decode_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[GroupState],
    policies: Sequence[GroupPolicy],
    prompt_length: Tensor,
    position: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """One decode step of the head groups of a layer (R7), as cache.attention.decode_layer but on
    the GPU. Changes the states.

    Args: query [B, H*G, D]; key, value [B, H, D], after RoPE, heads of a row contiguous;
    prompt_length, position int [B], position being the new token's; num_splits: programs for the
    slots of a head; None chooses by the GPU.
    Returns: out [B, H*G, D].
    Raises: ValueError where shapes, dtypes, strides or devices do not fit the states.
    """
    check_layer(query, key, value, states, policies, prompt_length, position)
    rows, num_heads, head_dim = key.shape
    numbers = LayerNumbers.of(query, key, value, policies)
    compiled_in = constants(head_dim, numbers.most_slots, query.element_size())
    if num_splits is None:
        num_blocks = triton.cdiv(numbers.most_slots, compiled_in["BLOCK_SLOTS"])
        num_splits = splits(rows * num_heads, num_blocks, multiprocessors(query.device))
    token = (query, key, value, position.to(torch.int32), prompt_length.to(torch.int32))
    out, caches = query.new_empty(query.shape), caches_of(states)
    if num_splits > 1:
        launch_split(token, caches, numbers, out, compiled_in, num_splits)
        return out
    decode_layer_kernel[(rows * num_heads,)](
        *token,
        *caches,
        query.new_empty(rows * num_heads * numbers.most_slots, dtype=torch.float32),
        out,
        **vars(numbers),
        **compiled_in,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where the interpreter runs on the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[GroupState],
    policies: Sequence[GroupPolicy],
    prompt_length: Tensor,
    position: Tensor,
) -> None:
    """Returns if the kernels may run on these tensors of a layer.

    Raises: ValueError, naming the first that does not fit.
    """
    groups = [policy.group for policy in policies]
    num_heads = sum(group.num_heads for group in groups)
    if not 1 <= len(states) == len(groups) <= MAX_GROUPS or key.shape[1:2] != (num_heads,):
        raise ValueError(
            f"{len(states)} caches and key {tuple(key.shape)} for {len(groups)} head groups of"
            f" {num_heads} heads; a layer has 1 to {MAX_GROUPS} groups, a cache each"
        )
    query_heads = query.shape[1] if query.dim() == 3 else 0
    if query_heads < num_heads or query_heads % num_heads:
        raise ValueError(
            f"query {tuple(query.shape)} has no whole number of query heads for {num_heads} KV"
            " heads"
        )
    members = query_heads // num_heads
    parts = zip(states, group_slices(groups), query_slices(groups, members), strict=True)
    for state, heads, queries in parts:
        check_group(
            query[:, queries], key[:, heads], value[:, heads], state, prompt_length, position
        )


@triton.jit(do_not_specialize=NUMBERS)
def decode_layer_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    prompt_length_ptr,
    cache_keys,
    cache_values,
    cache_positions,
    cache_scores,
    logits_ptr,
    out_ptr,
    query_stride,
    key_stride,
    value_stride,
    num_heads,
    query_group_size,
    grid_width,
    score_decay,
    most_slots,
    first_heads,
    group_heads,
    group_slots,
    num_sinks,
    num_recent,
    by_score,
    pinned_columns,
    age_quota,
    evict_every,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    SLOT_CAPACITY: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One decode step of one KV head of one row, of any group of the layer."""
    # query, out: [B, H*G, D]; key, value: [B, H, D]; position, prompt_length: int32 [B]; caches of
    # each group: [B, group heads, group slots, D], int32 and float32 [B, group heads, group slots];
    # logits: float32 [B, H, most slots]
    program = tl.program_id(0)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    decode_head(
        query_ptr + row * query_stride + head * query_group_size * HEAD_DIM,
        key_ptr + row * key_stride + head * HEAD_DIM,
        value_ptr + row * value_stride + head * HEAD_DIM,
        tl.load(position_ptr + row),
        tl.load(prompt_length_ptr + row),
        of_group(cache_keys, group) + first_slot * HEAD_DIM,
        of_group(cache_values, group) + first_slot * HEAD_DIM,
        of_group(cache_positions, group) + first_slot,
        of_group(cache_scores, group) + first_slot,
        logits_ptr + program.to(tl.int64) * most_slots,
        out_ptr + program.to(tl.int64) * query_group_size * HEAD_DIM,
        query_group_size,
        of_group(group_slots, group),
        of_group(num_sinks, group),
        of_group(num_recent, group),
        of_group(by_score, group),
        of_group(pinned_columns, group),
        grid_width,
        of_group(age_quota, group),
        of_group(evict_every, group),
        score_decay,
        HEAD_DIM,
        BLOCK_SLOTS,
        SLOT_CAPACITY,
        NUM_STAGES,
    )
