"""A window of consecutive tokens of each row in one pass, in torch: first attended, then as many as
are accepted written, as if they had come one by one (R7).

Nothing of the window is in a cache while it is attended: a token that is rejected leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.cache.attention import evict_full_heads
from ssd_export.cache.rules import slot_for_new_token
from ssd_export.cache.state import GroupState
from ssd_export.policy.layout import group_slices, query_slices
from ssd_export.policy.table import GroupPolicy


@dataclass(frozen=True)
class AttendedWindow:
    """A window that waits to be written.

    key, value: [B, H, W, D]; received: float32 [B, H, W, S + W], the probabilities that each query
    gave to the slots, then to the window's tokens, summed over the query heads of a KV head.
    """

    state: GroupState
    key: Tensor
    value: Tensor
    received: Tensor


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: GroupState,
    policy: GroupPolicy,
    prompt_length: Tensor,
    position: Tensor,
    active: Tensor,
) -> tuple[Tensor, AttendedWindow]:
    """(out [B, H*G, W, D], the window to write). Evicts in full heads of active rows, for the
    first token.

    Args: query [B, H*G, W, D]; key, value [B, H, W, D], after RoPE; prompt_length, position int
    [B], position being the first token's; active bool [B].
    """
    position_before = state.position.clone()
    score_before = state.score.clone() if state.score is not None else state.position
    evict_full_heads(state, policy, prompt_length, position)
    rests = ~active
    state.position[rests] = position_before[rests]
    if state.score is not None:
        state.score[rests] = score_before[rests]
    rows, num_heads, length, head_dim = key.shape
    grouped = query.reshape(rows, num_heads, -1, length, head_dim)
    keys, values = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
    logits = (grouped @ keys[:, :, None].mT * head_dim**-0.5).float()  # [B, H, G, W, S + W]
    later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    empty = (state.position < 0)[:, :, None].expand(-1, -1, length, -1)
    hidden = torch.cat([empty, later.expand(rows, num_heads, -1, -1)], dim=-1)
    probs = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(dim=-1)
    out = (probs.to(value.dtype) @ values[:, :, None]).reshape(query.shape)
    return out, AttendedWindow(state, key, value, probs.sum(dim=2))


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
    """(out [B, H*G, W, D], what writes the first counts [B] tokens of the window), of all head
    groups of a layer.

    Args: as attend_window; states, policies: by group.
    """
    groups, out = [policy.group for policy in policies], torch.empty_like(query)
    members = query.shape[1] // key.shape[1]
    parts = zip(states, policies, group_slices(groups), query_slices(groups, members), strict=True)
    windows = []
    for state, policy, heads, queries in parts:
        token = query[:, queries], key[:, heads], value[:, heads]
        out[:, queries], window = attend_window(
            *token, state, policy, prompt_length, position, active
        )
        windows.append(window)

    def write(counts: Tensor) -> None:
        for window in windows:
            write_window(window, position, counts)

    return out, write


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, state: GroupState, position: Tensor
) -> Tensor:
    """Attention out [B, H*G, W, D] of tokens in several grid rows, written into the slots of their
    positions first: slot and position are one in a state that keeps everything.

    Args: query [B, H*G, W, D]; key, value [B, H, W, D], after RoPE; position int64 [B, W].
    """
    rows, num_heads, length, head_dim = key.shape
    slot = position[:, None].expand(-1, num_heads, -1)  # [B, H, W]
    of_row = slot[..., None].expand(-1, -1, -1, head_dim)
    state.key.scatter_(2, of_row, key.to(state.key.dtype))
    state.value.scatter_(2, of_row, value.to(state.value.dtype))
    state.position.scatter_(2, slot, slot.to(torch.int32))
    grouped = query.reshape(rows, num_heads, -1, length, head_dim)
    logits = (grouped @ state.key[:, :, None].mT * head_dim**-0.5).float()  # [B, H, G, W, S]
    empty = (state.position < 0)[:, :, None]
    later = torch.arange(state.position.shape[2], device=slot.device) > slot[..., None]
    probs = logits.masked_fill((empty | later)[:, :, None], -torch.inf).softmax(dim=-1)
    return (probs.to(value.dtype) @ state.value[:, :, None]).reshape(query.shape)


def write_window(window: AttendedWindow, position: Tensor, counts: Tensor) -> None:
    """Writes the first counts [B] tokens of the window, each into the lowest empty slot (R6), and
    adds what their queries gave, in order (R2). position int [B]: of the first token.

    counts must not exceed the empty slots of any head.
    """
    state, num_slots = window.state, window.state.position.shape[2]
    slots: list[Tensor] = []
    for place in range(int(counts.max())):
        rows = (counts > place).nonzero()[:, 0]
        slot = slot_for_new_token(state.position)[..., None]  # [B, H, 1]
        slots.append(slot)
        number = (position + place).to(torch.int32)[:, None, None].expand_as(slot)
        _put(state.position, slot, number, rows)
        of_row = slot[..., None].expand(*slot.shape, window.key.shape[-1])
        for cached, new in ((state.key, window.key), (state.value, window.value)):
            _put(cached, of_row, new[:, :, place : place + 1], rows)
        if state.score is None:
            continue
        _put(state.score, slot, torch.zeros_like(slot, dtype=torch.float32), rows)
        given = window.received[:, :, place]
        total = given[..., :num_slots].clone()
        written = torch.cat(slots, dim=-1)
        total.scatter_add_(2, written, given[..., num_slots : num_slots + len(slots)])
        state.score[rows] += total[rows]


def _put(cached: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> None:
    """Scatters values into some rows of a cache tensor, along its slots."""
    cached[rows] = cached[rows].scatter(2, index[rows], values[rows].to(cached.dtype))
