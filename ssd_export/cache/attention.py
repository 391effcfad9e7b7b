"""Attention over a cache of slots, in torch: the reference for every backend (R2, R7, R8; told in
policy.py).

Query heads of one KV head are neighbors: query head h * G + g reads KV head h, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_export.cache.quantized_rows import quantize_rows
from ssd_export.cache.rules import evict, retention, slot_for_new_token
from ssd_export.cache.state import EMPTY, GroupState
from ssd_export.policy.layout import group_slices, query_slices
from ssd_export.policy.table import GREATEST_CODE, GroupPolicy


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt_length: Tensor
) -> tuple[Tensor, Tensor]:
    """Dense causal attention over prompts padded on the right (R8), and the scores it gives (R2).

    Args: query [B, Hq, T, D]; key, value [B, Hkv, T, D], after RoPE, finite at padding too;
    prompt_length int [B], 1..T.
    Returns: out [B, Hq, T, D], finite and meaningless at padding; scores float32 [B, Hkv, T], 0 at
    padding.
    """
    rows, num_kv_heads, length, head_dim = key.shape
    grouped = query.reshape(rows, num_kv_heads, -1, length, head_dim)
    logits = grouped @ key[:, :, None].mT * head_dim**-0.5
    token = torch.arange(length, device=key.device)
    later = token[None, :] > token[:, None]
    probs = logits.float().masked_fill(later, -torch.inf).softmax(dim=-1)
    out = probs.to(value.dtype) @ value[:, :, None]
    is_prompt = (token[None, :] < prompt_length[:, None]).to(probs.dtype)
    scores = torch.einsum("bhgqk,bq->bhk", probs, is_prompt)
    return out.reshape(query.shape), scores


def fill_from_prompt(
    state: GroupState, key: Tensor, value: Tensor, scores: Tensor, prompt_length: Tensor
) -> None:
    """Writes prompt token t to slot t of an empty state (R8); padding stays an empty slot.

    Args: key, value [B, H, T, D]; scores float32 [B, H, T]; prompt_length int [B].
    Raises: ValueError if the prompt fills every slot (R8 leaves room for a new token).
    """
    length = key.shape[2]
    if length >= state.position.shape[2]:
        raise ValueError(
            f"a prompt of {length} slots needs more than {state.position.shape[2]} cache slots"
        )
    token = torch.arange(length, dtype=torch.int32, device=key.device)
    held = (token[None, :] < prompt_length[:, None])[:, None]  # [B, 1, T]
    state.reset()
    for rows, cached, scales in (
        (key, state.key, state.key_scale),
        (value, state.value, state.value_scale),
    ):
        if scales is not None:
            rows, scale = quantize_rows(rows)
            scales[:, :, :length] = scale.masked_fill(~held, 0)
        cached[:, :, :length] = rows.masked_fill(~held[..., None], 0)
    state.position[:, :, :length] = torch.where(held, token, EMPTY)
    if state.score is not None:
        state.score[:, :, :length] = scores.masked_fill(~held, 0)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: GroupState,
    policy: GroupPolicy,
    prompt_length: Tensor,
    position: Tensor,
) -> Tensor:
    """One decode step of a head group (R7): the new token's attention over its cache. Changes
    state.

    Args: query [B, H*G, D]; key, value [B, H, D], after RoPE; prompt_length, position int [B],
    position being the new token's.
    Returns: out [B, H*G, D].
    """
    evict_full_heads(state, policy, prompt_length, position)
    slot = slot_for_new_token(state.position)[..., None]  # [B, H, 1]
    write_new_token(state, slot, key, value, position)
    rows, num_heads, head_dim = key.shape
    grouped = query.reshape(rows, num_heads, -1, head_dim)
    if state.key_scale is None:
        logits = (grouped @ state.key.mT * head_dim**-0.5).float()
    else:
        scaled = grouped * (head_dim**-0.5 / GREATEST_CODE)
        logits = (scaled @ state.key.to(query.dtype).mT).float() * state.key_scale[:, :, None]
    empty = (state.position < 0)[:, :, None]
    probs = logits.masked_fill(empty, -torch.inf).softmax(dim=-1)  # float32 [B, H, G, S]
    if state.score is not None:
        state.score += probs.sum(dim=2)
    if state.value_scale is None:
        return (probs.to(value.dtype) @ state.value).reshape(query.shape)
    weights = (probs * state.value_scale[:, :, None]).to(value.dtype)
    return (weights @ state.value.to(value.dtype) * (1 / GREATEST_CODE)).reshape(query.shape)


def decode_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[GroupState],
    policies: Sequence[GroupPolicy],
    prompt_length: Tensor,
    position: Tensor,
) -> Tensor:
    """decode_attention of every head group of a layer, each on its slice of the heads. Changes the
    states.

    Args and Returns: as decode_attention; states, policies: by group.
    """
    groups = [policy.group for policy in policies]
    members = query.shape[1] // key.shape[1]
    parts = zip(states, policies, group_slices(groups), query_slices(groups, members), strict=True)
    out = torch.empty_like(query)
    for state, policy, heads, queries in parts:
        out[:, queries] = decode_attention(
            query[:, queries],
            key[:, heads],
            value[:, heads],
            state,
            policy,
            prompt_length,
            position,
        )
    return out


def evict_full_heads(
    state: GroupState,
    policy: GroupPolicy,
    prompt_length: Tensor,
    position: Tensor,
) -> None:
    """Makes evict_every slots empty in each head of each row that has none (the first part of
    R7).
    """
    full = (state.position >= 0).all(dim=-1, keepdim=True)  # [B, H, 1]
    if not full.any():
        return
    group = policy.group
    retained = retention(
        state.position, state.score, group.rule, prompt_length, position, policy.grid_width
    )
    evicted = evict(state.position, retained, group.evict_every)
    state.position.copy_(torch.where(full, evicted, state.position))
    if state.score is not None:
        state.score.copy_(torch.where(full, state.score * policy.score_decay, state.score))


def write_new_token(
    state: GroupState, slot: Tensor, key: Tensor, value: Tensor, position: Tensor
) -> None:
    """Writes key and value [B, H, D] and position [B] into slot [B, H, 1] of each head, score 0."""
    row_index = slot[..., None].expand(*slot.shape, key.shape[-1])
    for row, cached, scales in (
        (key, state.key, state.key_scale),
        (value, state.value, state.value_scale),
    ):
        if scales is not None:
            row, scale = quantize_rows(row)
            scales.scatter_(2, slot, scale[:, :, None])
        cached.scatter_(2, row_index, row[:, :, None])
    state.position.scatter_(2, slot, position.to(torch.int32)[:, None, None].expand_as(slot))
    if state.score is not None:
        state.score.scatter_(2, slot, 0.0)
