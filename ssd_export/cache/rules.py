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
    return rank.masked_fill(protected | (position < 0), torch.inf)


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
