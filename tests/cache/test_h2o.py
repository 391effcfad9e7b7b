"""The h2o rule against the published H2OKVCache_LayerWise, rewritten as a loop over one head.

The published class evicts after a step's attention and keeps hh_size + recent_size tokens; ours
evicts before the next token is written (R7) and then attends over num_slots tokens. The same
candidates with the same scores meet at both moments, so with num_slots = hh_size + recent_size + 1
and num_recent = recent_size + 1 the tokens attended are the same at every step; ours merely holds
the victim until the next step begins. The published class sums over its batch, so it is right for
one row only; here it runs once per row and head.
"""

from __future__ import annotations

import pytest
import torch

from ssd_export.policy.table import Rule
from tests.cache.test_attention import Reference
from tests.cases import Case


class PublishedH2O:
    """hh_score: summed attention, prefill included, not normalized; the newest recent_size are
    kept.
    """

    def __init__(self, hh_size: int, recent_size: int) -> None:
        self.hh_size, self.recent_size = hh_size, recent_size
        self.tokens: list[int] = []
        self.hh_score: list[float] = []

    def update(self, probs: torch.Tensor, tokens: list[int]) -> None:
        """probs [new tokens, len(tokens)]: the attention of the new tokens, which are the last of
        tokens.
        """
        sums = probs.sum(0).tolist()
        old = self.hh_score + [0.0] * (len(tokens) - len(self.hh_score))
        self.tokens, self.hh_score = list(tokens), [a + b for a, b in zip(old, sums)]
        if len(tokens) <= self.hh_size + self.recent_size:
            return
        num_candidates = len(tokens) - self.recent_size
        heavy = sorted(range(num_candidates), key=lambda index: -self.hh_score[index])[
            : self.hh_size
        ]
        kept = sorted(heavy) + list(range(num_candidates, len(tokens)))
        self.tokens = [self.tokens[index] for index in kept]
        self.hh_score = [self.hh_score[index] for index in kept]


def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    logits = query.double() @ key.double().T / query.shape[-1] ** 0.5
    later = torch.ones_like(logits).triu(1 + key.shape[0] - query.shape[0]).bool()
    return logits.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize("hh_size, recent_size", [(5, 6), (1, 10), (10, 1), (8, 20)])
def test_h2o_attends_to_the_tokens_of_the_published_class(hh_size: int, recent_size: int) -> None:
    case = Case(
        "h2o",
        Rule(0, recent_size + 1, True),
        hh_size + recent_size + 1,
        num_heads=3,
        prompt_slots=6,
        prompt_lengths=(6, 4),
        steps=70,
        seed=7,
    )
    backend = Reference(case)
    backend.prefill()
    data, published = backend.data, {}
    for row, length in enumerate(case.prompt_lengths):
        for head in range(case.num_heads):
            cache = published[row, head] = PublishedH2O(hh_size, recent_size)
            prompt = attention(
                data.prompt_query[row, head, :length], data.prompt_key[row, head, :length]
            )
            cache.update(prompt, list(range(length)))
    for index in range(case.steps):
        _, position, score = backend.step(index)
        for (row, head), cache in published.items():
            length = case.prompt_lengths[row]
            tokens = cache.tokens + [length + index]
            held = position[row, head]
            assert sorted(held[held >= 0].tolist()) == tokens
            keys = torch.cat([data.prompt_key[row, head, :length], data.key[:, row, head]])[tokens]
            cache.update(attention(data.query[index, row, head][None], keys), tokens)
            ours = dict(zip(held.tolist(), score[row, head].tolist()))
            assert [ours[token] for token in cache.tokens] == pytest.approx(
                cache.hh_score, abs=1e-4
            )
