"""R3 to R6 as pure tensor functions, vectorised over rows and heads: the reference for every
backend.

The rules are told in policy.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_export.cache.state import EMPTY
from ssd_export.policy.table import Rule


def retention(
    position: Tensor,
    score: Tensor | None,
    rule: Rule,
    prompt_length: Tensor,
    newest: Tensor,
    grid_width: int,
) -> Tensor:
    """Retention of each slot (R3), float32 [B, H, S]: +inf where it is protected, also where empty.

    Args: position int [B, H, S]; score float32 [B, H, S] if by_score; prompt_length, newest int
    [B].
    """
    prompt_length, newest = prompt_length[:, None, None], newest[:, None, None]
    num_sinks = prompt_length if rule.num_sinks < 0 else rule.num_sinks
    protected = (position < num_sinks) | (position > newest - rule.num_recent)
    if rule.pinned_columns:
        protected |= _pinned(position - prompt_length, rule.pinned_columns, grid_width)
    rank = position.float()
    if rule.by_score:
        assert score is not None
        rank = score
    rank = rank.masked_fill(protected | (position < 0), torch.inf)
    return _rank_by_turns(position, rank, newest) if rule.age_quota else rank


def _rank_by_turns(position: Tensor, rank: Tensor, newest: Tensor) -> Tensor:
    """R3's retention with age_quota, of rank [B, H, S], the retention without it."""
    is_free = rank < torch.inf
    num_free = is_free.sum(dim=-1, keepdim=True)
    is_odd = newest % 2  # [B, 1, 1]
    age = position.masked_fill(~is_free, torch.iinfo(position.dtype).max)
    older = _places(age) < (num_free + 1 - is_odd) // 2
    leads = older != (is_odd == 1)
    turns = torch.full_like(rank, torch.inf)
    for half, first in ((leads, 0), (~leads, 1)):
        of_half = rank.masked_fill(~half, torch.inf)
        turns = torch.where(of_half < torch.inf, 2.0 * _places(of_half) + first, turns)
    return turns


def _places(values: Tensor) -> Tensor:
    """Place of each slot among those of its head, from the least value on, ties by slot (R4)."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def _pinned(image_index: Tensor, pinned_columns: int, grid_width: int) -> Tensor:
    columns = torch.tensor([bool(pinned_columns >> column & 1) for column in range(grid_width)])
    return (image_index >= 0) & columns.to(image_index.device)[image_index % grid_width]


def evict(position: Tensor, retained: Tensor, count: int) -> Tensor:
    """position [B, H, S] with the slots of the count tokens of least retention emptied (R4, R5)."""
    ranked = retained.argsort(dim=-1, stable=True)
    return position.scatter(-1, ranked[..., :count], EMPTY)


def slot_for_new_token(position: Tensor) -> Tensor:
    """The lowest empty slot (R6), int64 [B, H]. position [B, H, S] must have one in every head."""
    return (position < 0).int().argmax(dim=-1)
