"""Teacher-forced attention with the cache that a head option leaves, without generating token by
token.

Between two evictions a head only gains tokens, so all queries of such a block are computed at once:
what a block of evict_every queries attends to is known when it begins (R5 to R7). Sinks and a
sliding window need no blocks at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.cache.rules import evict, retention
from ssd_export.cache.state import EMPTY
from ssd_export.config import Grid
from ssd_export.policy.table import HeadOption


@dataclass(frozen=True)
class DenseAttention:
    """Causal attention of a sequence: a prompt, then image tokens; all rows have a prompt of one
    length.

    logits: float32 [B, H, G, T, T], scaled, -inf for later keys; probs: their softmax; value:
    float32 [B, H, T, D]; out: float32 [B, H, G, T, D].
    """

    logits: Tensor
    probs: Tensor
    value: Tensor
    out: Tensor
    prompt_length: int
    grid: Grid

    @classmethod
    def compute(
        cls, query: Tensor, key: Tensor, value: Tensor, prompt_length: int, grid: Grid
    ) -> DenseAttention:
        """Computes the logits of full causal attention.

        Args: query [B, H*G, T, D]; key, value [B, H, T, D], after RoPE.
        """
        rows, num_kv_heads, length, head_dim = key.shape
        grouped = query.float().reshape(rows, num_kv_heads, -1, length, head_dim)
        value = value.float()
        logits = grouped @ key.float()[:, :, None].mT * head_dim**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
        logits.masked_fill_(later, -torch.inf)
        probs = logits.softmax(dim=-1)
        return cls(logits, probs, value, probs @ value[:, :, None], prompt_length, grid)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of the sequence."""
        return self.logits.shape[-1] - self.prompt_length


def keeps_everything(dense: DenseAttention, option: HeadOption, prompt_slots: int) -> bool:
    """Whether the option's slots, and those that the prompt leaves free, hold all image tokens:
    nothing is evicted.
    """
    return _capacity(dense, option, prompt_slots) >= dense.num_image_tokens


def _capacity(dense: DenseAttention, option: HeadOption, prompt_slots: int) -> int:
    """Slots for image tokens."""
    return prompt_slots + option.image_slots - dense.prompt_length


def attend_with_option(
    dense: DenseAttention,
    option: HeadOption,
    prompt_slots: int,
    score_decay: float = 1.0,
    heads: slice = slice(None),
) -> Tensor:
    """Attention output of the image tokens' queries with the option's cache: float32 [B, H, G, I,
    D].

    Args: heads: the KV heads that are wanted.
    """
    if keeps_everything(dense, option, prompt_slots):
        return dense.out[:, heads, :, dense.prompt_length :]
    capacity, rule = _capacity(dense, option, prompt_slots), option.rule
    if not (rule.by_score or rule.pinned_columns or rule.age_quota):
        num_sinks = dense.prompt_length if rule.num_sinks < 0 else rule.num_sinks
        return _window(dense, capacity, num_sinks, option.evict_every, heads)
    return _blocks(dense, option, capacity, score_decay, heads)


def _window(
    dense: DenseAttention, capacity: int, num_sinks: int, evict_every: int, heads: slice
) -> Tensor:
    """The sinks and the newest tokens: after r evictions the r * evict_every oldest tokens after
    the sinks are gone.
    """
    start = dense.prompt_length
    token = torch.arange(dense.logits.shape[-1], device=dense.logits.device)
    step = token[start:] - start
    evictions = torch.where(step < capacity, 0, (step - capacity) // evict_every + 1)
    gone = (token >= num_sinks) & (
        token < (num_sinks + evictions * evict_every)[:, None]
    )  # [query, key]
    logits = dense.logits[:, heads, :, start:].masked_fill(gone, -torch.inf)
    return logits.softmax(dim=-1) @ dense.value[:, heads, None]


def _blocks(
    dense: DenseAttention, option: HeadOption, capacity: int, score_decay: float, heads: slice
) -> Tensor:
    start, total = dense.prompt_length, dense.num_image_tokens
    logits, value = dense.logits[:, heads], dense.value[:, heads]
    rows, num_heads = logits.shape[:2]
    filled = start + capacity
    out = dense.out[:, heads, :, start:].clone()
    position = torch.arange(filled, dtype=torch.int32, device=logits.device).expand(
        rows, num_heads, -1
    )
    score = dense.probs[:, heads, :, :filled, :filled].sum(
        dim=(2, 3)
    )  # what prompt and first tokens gave (R2)
    prompt_length = torch.full((rows,), start, device=logits.device)
    for step in range(capacity, total, option.evict_every):
        retained = retention(
            position, score, option.rule, prompt_length, prompt_length + step, dense.grid.width
        )
        position = evict(position, retained, option.evict_every)
        score = score * score_decay
        queries = torch.arange(
            start + step, start + min(step + option.evict_every, total), device=logits.device
        )
        position, score = _write(position, score, queries, option.evict_every)
        probs = _attend(logits[:, :, :, queries], position, queries)
        rows_of_value = position.clamp(min=0).long()[..., None].expand(-1, -1, -1, value.shape[-1])
        out[:, :, :, step : step + len(queries)] = (
            probs @ value.gather(2, rows_of_value)[:, :, None]
        )
        score = score + probs.sum(dim=(2, 3))
    return out


def _write(
    position: Tensor, score: Tensor, tokens: Tensor, num_empty: int
) -> tuple[Tensor, Tensor]:
    """The tokens of a block in the empty slots, lowest first (R6), with score 0; slots to spare
    stay empty.
    """
    empty = (
        (position < 0).nonzero()[:, 2].reshape(*position.shape[:2], num_empty)[..., : len(tokens)]
    )
    written = tokens.to(torch.int32).expand_as(empty)
    return position.scatter(-1, empty, written), score.scatter(-1, empty, 0.0)


def _attend(logits: Tensor, position: Tensor, queries: Tensor) -> Tensor:
    """Probabilities [B, H, G, queries, S] over the slots; logits [B, H, G, queries, T]."""
    index = position.clamp(min=0).long()[:, :, None, None].expand(*logits.shape[:4], -1)
    taken = logits.gather(-1, index)  # a token of the block that comes after a query: -inf already
    return taken.masked_fill((position == EMPTY)[:, :, None, None], -torch.inf).softmax(dim=-1)
