"""Attention of a window of steps over the caches of a layer, as cache/window_attention.py but on
the GPU: W queries of each row in one pass, and afterwards as many tokens written as are accepted.

A first kernel evicts in full heads, for the first token of the window. The second has a program for
each query head of each row and each place of the window: it attends over the cache, then over the
window's tokens up to its place, which are in no cache yet. All places of a head read the same keys
out of the caches of the GPU. Logits stay in a workspace until the tokens are accepted; then the
third kernel, a program a head, writes the tokens that count into the slots of single steps (R6) and
adds what their queries gave, in their order (R2). A token that is rejected leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.kernels.constants import NUM_WARPS, constants
from ssd_export.kernels.head_step import (
    attend,
    evict_if_full,
    load_query,
    store_out,
    write_token,
)
from ssd_export.kernels.layer_attention import check_layer
from ssd_export.kernels.layer_groups import (
    LayerNumbers,
    caches_of,
    first_slot_of,
    group_of,
    of_group,
)
from ssd_export.policy.table import GroupPolicy

NOT_TAKEN = tl.constexpr(1 << 30)  # the number of a slot that no token of the window takes
OF_HEADS = (
    "num_heads",
    "query_group_size",
    "first_heads",
    "group_heads",
    "group_slots",
    "by_score",
)
OF_ATTENTION = (*OF_HEADS, "query_stride", "key_stride", "value_stride", "kept_slots")
OF_WRITE = (*OF_HEADS, "key_stride", "value_stride", "num_places", "kept_slots")
OF_EVICTION = (
    "num_heads",
    "grid_width",
    "score_decay",
    "first_heads",
    "group_heads",
    "group_slots",
    "num_sinks",
    "num_recent",
    "by_score",
    "pinned_columns",
    "age_quota",
    "evict_every",
)


@dataclass(frozen=True)
class AttendedLayer:
    """A window of a layer that waits to be written. kept_slots: of the largest group that ranks by
    score, 0 where none does; key, value [B, H, W, D]; logits float32 [B, H*G, W, kept slots + W],
    of such groups alone; largest, total float32 [B, H*G, W], of each query's softmax.
    """

    states: Sequence[GroupState]
    numbers: LayerNumbers
    kept_slots: int
    key: Tensor
    value: Tensor
    logits: Tensor
    largest: Tensor
    total: Tensor


def attend_layer_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[GroupState],
    policies: Sequence[GroupPolicy],
    prompt_length: Tensor,
    position: Tensor,
    active: Tensor,
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """(out [B, H*G, W, D], what writes the first counts [B] tokens of the window). Evicts in full
    heads of active rows, for the first token.

    Args: query [B, H*G, W, D]; key, value [B, H, W, D], after RoPE; prompt_length, position int
    [B], position being the first token's; active bool [B].
    Raises: ValueError where shapes, dtypes or devices do not fit the states.
    """
    query, key, value = (part.contiguous() for part in (query, key, value))
    first, first_key, first_value = (part[:, :, 0].contiguous() for part in (query, key, value))
    check_layer(first, first_key, first_value, states, policies, prompt_length, position)
    rows, num_heads, num_places, head_dim = key.shape
    numbers = LayerNumbers.of(first, first_key, first_value, policies)
    caches = caches_of(states)
    compiled_in = constants(head_dim, numbers.most_slots, query.element_size())
    evict_window_kernel[(rows * num_heads,)](
        position.to(torch.int32),
        prompt_length.to(torch.int32),
        active.to(torch.int32),
        *caches[2:],
        **_some(numbers, OF_EVICTION),
        SLOT_CAPACITY=compiled_in["SLOT_CAPACITY"],
        num_warps=NUM_WARPS,
    )
    queries, out = query.shape[:3], torch.empty_like(query)
    kept = max((one.group.num_slots for one in policies if one.group.rule.by_score), default=0)
    window = AttendedLayer(
        states,
        numbers,
        kept,
        key,
        value,
        query.new_empty(*queries, kept + num_places, dtype=torch.float32),
        query.new_empty(queries, dtype=torch.float32),
        query.new_empty(queries, dtype=torch.float32),
    )
    attend_window_kernel[(rows * num_heads, numbers.query_group_size * num_places)](
        query,
        key,
        value,
        *caches[:3],
        window.logits,
        window.largest,
        window.total,
        out,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        kept_slots=kept,
        **_some(numbers, OF_HEADS),
        **{name: compiled_in[name] for name in ("HEAD_DIM", "BLOCK_SLOTS", "NUM_STAGES")},
        num_warps=NUM_WARPS,
    )
    return out, partial(_write_window, window, position)


def _write_window(window: AttendedLayer, position: Tensor, counts: Tensor) -> None:
    """Writes the first counts [B] tokens, no more than any head has empty slots; position int [B]:
    of the first token.
    """
    rows, num_heads, num_places, head_dim = window.key.shape
    compiled_in = constants(head_dim, window.numbers.most_slots, window.key.element_size())
    write_window_kernel[(rows * num_heads,)](
        window.key,
        window.value,
        position.to(torch.int32),
        counts.to(torch.int32),
        *caches_of(window.states),
        window.logits,
        window.largest,
        window.total,
        window.key.stride(0),
        window.value.stride(0),
        num_places,
        kept_slots=window.kept_slots,
        **_some(window.numbers, OF_HEADS),
        **{name: compiled_in[name] for name in ("HEAD_DIM", "SLOT_CAPACITY")},
        num_warps=NUM_WARPS,
    )


def _some(numbers: LayerNumbers, names: Sequence[str]) -> dict[str, object]:
    return {name: getattr(numbers, name) for name in names}


@triton.jit(do_not_specialize=OF_EVICTION)
def evict_window_kernel(
    position_ptr,
    prompt_length_ptr,
    active_ptr,
    cache_positions,
    cache_scores,
    num_heads,
    grid_width,
    score_decay,
    first_heads,
    group_heads,
    group_slots,
    num_sinks,
    num_recent,
    by_score,
    pinned_columns,
    age_quota,
    evict_every,
    SLOT_CAPACITY: tl.constexpr,
):
    """The eviction before the window, of one KV head of one row."""
    # position, prompt_length, active: int32 [B]; caches as decode_layer_kernel's
    program = tl.program_id(0)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    position_of_head = of_group(cache_positions, group) + first_slot
    score_of_head = of_group(cache_scores, group) + first_slot
    num_slots, is_by_score = of_group(group_slots, group), of_group(by_score, group)
    position, present, score, present_score = evict_if_full(
        position_of_head,
        score_of_head,
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
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = tl.where(slot < num_slots, tl.load(active_ptr + row), 0) != 0
    is_scored = tl.where(is_slot, is_by_score, 0) != 0
    tl.store(position_of_head + slot, present, mask=is_slot & (present != position))
    tl.store(score_of_head + slot, present_score, mask=is_scored & (present_score != score))


@triton.jit(do_not_specialize=OF_ATTENTION)
def attend_window_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cache_keys,
    cache_values,
    cache_positions,
    logits_ptr,
    largest_ptr,
    total_ptr,
    out_ptr,
    query_stride,
    key_stride,
    value_stride,
    kept_slots,
    num_heads,
    query_group_size,
    first_heads,
    group_heads,
    group_slots,
    by_score,
    HEAD_DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One place of the window, of one query head of one row."""
    # query, out: [B, H*G, W, D]; key, value: [B, H, W, D], heads and places of a row contiguous;
    # logits, largest, total as in AttendedLayer
    program, num_places = tl.program_id(0), tl.num_programs(1) // query_group_size
    place = tl.program_id(1) % num_places
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    num_slots, is_by_score = of_group(group_slots, group), of_group(by_score, group)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    first_token = head * num_places * HEAD_DIM
    of_row = head * tl.num_programs(1) + tl.program_id(1)
    at = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    query = load_query(query_ptr + row * query_stride + of_row * HEAD_DIM, HEAD_DIM)
    kept = logits_ptr + at * (kept_slots + num_places)
    sums_of_window, largest_of_window, total_of_window = attend(
        query,
        key_ptr + row * key_stride + first_token,
        value_ptr + row * value_stride + first_token,
        None,
        kept + kept_slots,
        0,
        place + 1,
        tl.where(is_by_score != 0, place + 1, 0),
        HEAD_DIM,
        BLOCK_SLOTS,
        NUM_STAGES,
    )
    sums, largest, total = attend(
        query,
        of_group(cache_keys, group) + first_slot * HEAD_DIM,
        of_group(cache_values, group) + first_slot * HEAD_DIM,
        of_group(cache_positions, group) + first_slot,
        kept,
        0,
        num_slots,
        tl.where(is_by_score != 0, num_slots, 0),
        HEAD_DIM,
        BLOCK_SLOTS,
        NUM_STAGES,
    )
    largest_of_all = tl.maximum(largest, largest_of_window)
    weight = tl.exp(largest - largest_of_all)
    weight_of_window = tl.exp(largest_of_window - largest_of_all)
    total_of_all = total * weight + total_of_window * weight_of_window
    out = (sums * weight + sums_of_window * weight_of_window) / total_of_all
    store_out(out_ptr + at * HEAD_DIM, out, HEAD_DIM)
    tl.store(largest_ptr + at, largest_of_all)
    tl.store(total_ptr + at, total_of_all)


@triton.jit(do_not_specialize=OF_WRITE)
def write_window_kernel(
    key_ptr,
    value_ptr,
    position_ptr,
    counts_ptr,
    cache_keys,
    cache_values,
    cache_positions,
    cache_scores,
    logits_ptr,
    largest_ptr,
    total_ptr,
    key_stride,
    value_stride,
    num_places,
    kept_slots,
    num_heads,
    query_group_size,
    first_heads,
    group_heads,
    group_slots,
    by_score,
    HEAD_DIM: tl.constexpr,
    SLOT_CAPACITY: tl.constexpr,
):
    """Writes the tokens that count, and what their queries gave, of one KV head of one row."""
    # key, value, logits, largest, total as attend_window_kernel's; position, counts: int32 [B]
    program = tl.program_id(0)
    row, head = (program // num_heads).to(tl.int64), program % num_heads
    group = group_of(head, first_heads)
    num_slots, is_by_score = of_group(group_slots, group), of_group(by_score, group)
    first_slot = first_slot_of(row, head, group, first_heads, group_heads, group_slots)
    position_of_head = of_group(cache_positions, group) + first_slot
    score_of_head = of_group(cache_scores, group) + first_slot
    slot = tl.arange(0, SLOT_CAPACITY)
    is_slot = slot < num_slots
    is_scored = tl.where(is_slot, is_by_score, 0) != 0
    position = tl.load(position_of_head + slot, mask=is_slot, other=0)
    score = tl.load(score_of_head + slot, mask=is_scored, other=0.0)
    count, is_empty = tl.load(counts_ptr + row), position < 0
    rank = tl.cumsum(is_empty.to(tl.int32), 0) - 1
    number = tl.where(is_empty & (rank < count), rank, NOT_TAKEN)  # of the token it takes (R6)
    is_new = number < NOT_TAKEN
    score = tl.where(is_new, 0.0, score)
    for place in range(count):
        for member in range(query_group_size):
            at = (program.to(tl.int64) * query_group_size + member) * num_places + place
            kept = logits_ptr + at * (kept_slots + num_places)
            at_slot = tl.where(number <= place, kept_slots + number, slot)
            logits = tl.load(kept + at_slot, mask=is_scored, other=float("-inf"))
            largest, total = tl.load(largest_ptr + at), tl.load(total_ptr + at)
            score += tl.where(is_scored, tl.exp(logits - largest) / total, 0.0)
    tl.store(position_of_head + slot, tl.load(position_ptr + row) + number, mask=is_slot & is_new)
    tl.store(score_of_head + slot, score, mask=is_scored)
    for place in range(count):
        token = (head * num_places + place) * HEAD_DIM
        write_token(
            key_ptr + row * key_stride + token,
            value_ptr + row * value_stride + token,
            of_group(cache_keys, group) + first_slot * HEAD_DIM,
            of_group(cache_values, group) + first_slot * HEAD_DIM,
            tl.min(tl.where(number == place, slot, num_slots - 1), 0),
            HEAD_DIM,
        )
