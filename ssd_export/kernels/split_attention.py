"""Attention of a layer whose heads are too few to fill a GPU: the slots of each head are split over
several programs, and a second kernel combines what they found.

Every program of a head finds the slot of the new token for itself, which changes nothing, and
attends over its part of the slots; the positions and scores that the step leaves, the logits and
the sums of the part stay in workspaces. The program whose part has the new token's slot writes its
key and value, which no other reads. Only the second kernel, one program a head, changes positions
and scores, and it adds the parts up in their order: the same numbers in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.kernels.constants import NUM_WARPS, combining
from ssd_export.kernels.head_step import attend, load_query, place_token, store_out, write_token
from ssd_export.kernels.layer_groups import (
    NUMBERS,
    LayerNumbers,
    first_slot_of,
    group_of,
    of_group,
)

COMBINED = (
    "num_heads",
    "query_group_size",
    "most_slots",
    "first_heads",
    "group_heads",
    "group_slots",
    "by_score",
)


def launch_split(
    token: Sequence[Tensor],
    caches: Sequence[tuple[Tensor, ...]],
    numbers: LayerNumbers,
    out: Tensor,
    compiled_in: dict[str, int],
    num_splits: int,
) -> None:
    """Queues both kernels of a step.

    Args: token: query, key, value, position, prompt_length; caches: as caches_of; out [B, H*G, D];
    compiled_in: constants of the kernel.
    """
    query, (rows, num_heads, head_dim) = token[0], token[1].shape
    heads, query_heads, slots = rows * num_heads, rows * query.shape[1], numbers.most_slots
    left = (
        query.new_empty(heads, slots, dtype=torch.int32),
        query.new_empty(heads, slots, dtype=torch.float32),
        query.new_empty(query_heads, slots, dtype=torch.float32),
        query.new_empty(query_heads, num_splits, head_dim, dtype=torch.float32),
        query.new_empty(query_heads, num_splits, dtype=torch.float32),
        query.new_empty(query_heads, num_splits, dtype=torch.float32),
    )
    attend_split_kernel[(heads, num_splits)](
        *token,
        *caches,
        *left,
        **vars(numbers),
        **compiled_in,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    combine_splits_kernel[(heads,)](
        *caches[2:],
        *left,
        out,
        num_splits=num_splits,
        **{name: getattr(numbers, name) for name in COMBINED},
        **combining(compiled_in),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=NUMBERS)
def attend_split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    prompt_length_ptr,
    cache_keys,
    cache_values,
    cache_positions,
    cache_scores,
    present_ptr,
    score_ptr,
    logits_ptr,
    sums_ptr,
    largest_ptr,
    total_ptr,
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
    """One part of the slots of one KV head of one row."""
    # As decode_layer_kernel, and left for the second kernel: present int32, score float32 [B, H,
    # most slots]; logits float32 [B, H*G, most slots]; sums, largest, total float32 [B, H*G, parts,
    # D] and [B, H*G, parts]
    program, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    num_slots = of_group(group_slots, group)
    is_by_score = of_group(by_score, group)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    cache_key_ptr = of_group(cache_keys, group) + first_slot * HEAD_DIM
    cache_value_ptr = of_group(cache_values, group) + first_slot * HEAD_DIM
    taken, _, present, _, present_score = place_token(
        of_group(cache_positions, group) + first_slot,
        of_group(cache_scores, group) + first_slot,
        tl.load(position_ptr + row),
        tl.load(prompt_length_ptr + row),
        num_slots,
        of_group(num_sinks, group),
        of_group(num_recent, group),
        is_by_score,
        of_group(pinned_columns, group),
        grid_width,
        of_group(age_quota, group),
        of_group(evict_every, group),
        score_decay,
        SLOT_CAPACITY,
    )
    of_a_part = tl.cdiv(tl.cdiv(num_slots, BLOCK_SLOTS), num_parts) * BLOCK_SLOTS
    first = tl.minimum(part * of_a_part, num_slots)
    end = tl.minimum(first + of_a_part, num_slots)
    present_ptr += program.to(tl.int64) * most_slots
    score_ptr += program.to(tl.int64) * most_slots
    slot = tl.arange(0, SLOT_CAPACITY)
    is_own = (slot >= first) & (slot < end)
    tl.store(present_ptr + slot, present, mask=is_own)
    tl.store(score_ptr + slot, present_score, mask=tl.where(is_own, is_by_score, 0) != 0)
    if (taken >= first) & (taken < end):
        write_token(
            key_ptr + row * key_stride + head * HEAD_DIM,
            value_ptr + row * value_stride + head * HEAD_DIM,
            cache_key_ptr,
            cache_value_ptr,
            taken,
            HEAD_DIM,
        )
    tl.debug_barrier()  # every thread sees the new token and the positions of this part
    query_ptr += row * query_stride + head * query_group_size * HEAD_DIM
    for member in range(query_group_size):
        query_head = program.to(tl.int64) * query_group_size + member
        sums, largest, total = attend(
            load_query(query_ptr + member * HEAD_DIM, HEAD_DIM),
            cache_key_ptr,
            cache_value_ptr,
            present_ptr,
            logits_ptr + query_head * most_slots,
            first,
            end,
            tl.where(is_by_score != 0, end, 0),
            HEAD_DIM,
            BLOCK_SLOTS,
            NUM_STAGES,
        )
        place = query_head * num_parts + part
        store_out(sums_ptr + place * HEAD_DIM, sums, HEAD_DIM)
        tl.store(largest_ptr + place, largest)
        tl.store(total_ptr + place, total)


@triton.jit(do_not_specialize=(*COMBINED, "num_splits"))
def combine_splits_kernel(
    cache_positions,
    cache_scores,
    present_ptr,
    score_ptr,
    logits_ptr,
    sums_ptr,
    largest_ptr,
    total_ptr,
    out_ptr,
    num_splits,
    num_heads,
    query_group_size,
    most_slots,
    first_heads,
    group_heads,
    group_slots,
    by_score,
    HEAD_DIM: tl.constexpr,
    SLOT_CAPACITY: tl.constexpr,
    SPLIT_CAPACITY: tl.constexpr,
):
    """Output, positions and scores (R2) of one KV head of one row, from all its parts."""
    program = tl.program_id(0)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    is_by_score = of_group(by_score, group)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = slot < of_group(group_slots, group)
    is_scored = tl.where(is_slot, is_by_score, 0) != 0
    left = program.to(tl.int64) * most_slots + slot
    present = tl.load(present_ptr + left, mask=is_slot)
    tl.store(of_group(cache_positions, group) + first_slot + slot, present, mask=is_slot)
    score = tl.load(score_ptr + left, mask=is_scored, other=0.0)
    part = tl.arange(0, SPLIT_CAPACITY)
    dim = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    for member in range(query_group_size):
        query_head = program.to(tl.int64) * query_group_size + member
        place = query_head * num_splits + part
        is_part = part < num_splits
        largest = tl.load(largest_ptr + place, mask=is_part, other=float("-inf"))
        total = tl.load(total_ptr + place, mask=is_part, other=0.0)
        largest_of_all = tl.max(largest, 0)
        weight = tl.exp(largest - largest_of_all)
        total_of_all = tl.sum(weight * total, 0)
        sums = tl.load(
            sums_ptr + place[:, None] * HEAD_DIM + dim[None, :],
            mask=is_part[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        out = tl.sum(weight[:, None] * sums, 0) / total_of_all
        store_out(out_ptr + query_head * HEAD_DIM, out, HEAD_DIM)
        logits = tl.load(
            logits_ptr + query_head * most_slots + slot, mask=is_scored, other=float("-inf")
        )
        score += tl.exp(logits - largest_of_all) / total_of_all
    tl.store(of_group(cache_scores, group) + first_slot + slot, score, mask=is_scored)
