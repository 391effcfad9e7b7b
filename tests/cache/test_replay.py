"""The teacher-forced shortcut keeps what cache/attention.py keeps, token by token."""

from __future__ import annotations

import pytest
import torch

from ssd_export.cache.attention import decode_attention, fill_from_prompt, prefill_attention
from ssd_export.cache.replay import DenseAttention, attend_with_option
from ssd_export.cache.state import GroupState
from ssd_export.config import Grid
from ssd_export.model.families.janus import GRID
from ssd_export.policy.menu import menu, mostly_recent, scored, window
from ssd_export.policy.table import GroupPolicy, HeadGroup, HeadOption, Rule

ROWS, HEADS, SIZE, DIM = 2, 3, 2, 8
OPTIONS = (
    window(16),
    window(25),
    scored(64, GRID),
    scored(48, GRID),
    mostly_recent(32, GRID),
    HeadOption(Rule(-1, 0, False), 40, 6),
    HeadOption(Rule(4, 0, False), 30, 1),
    HeadOption(Rule(20, 5, False), 40, 7),
    HeadOption(Rule(-1, 10, True), 30, 1),
    HeadOption(Rule(0, 10, True), 40, 7),
    HeadOption(Rule(-1, 3, True, 1 | 1 << 23), 80, 12),
    HeadOption(Rule(-1, 0, False, 1 << 5), 50, 24),
)


def sequence(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (ROWS, HEADS * SIZE, length, DIM),
        (ROWS, HEADS, length, DIM),
        (ROWS, HEADS, length, DIM),
    ]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return 1.5 * query, key, value


def token_by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    option: HeadOption,
    prompt: int,
    slots: int,
    decay: float,
) -> torch.Tensor:
    """[B, H, G, I, D] by prefill and decode steps of the reference."""
    group = HeadGroup(option.rule, slots + option.image_slots, option.evict_every, HEADS)
    state, lengths = GroupState.empty(ROWS, group, DIM), torch.full((ROWS,), prompt)
    _, scores = prefill_attention(
        query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], lengths
    )
    fill_from_prompt(state, key[:, :, :prompt], value[:, :, :prompt], scores, lengths)
    out = [
        decode_attention(
            query[:, :, t],
            key[:, :, t],
            value[:, :, t],
            state,
            GroupPolicy(group, decay, GRID.width),
            lengths,
            torch.full((ROWS,), t),
        )
        for t in range(prompt, query.shape[2])
    ]
    return torch.stack(out, dim=2).unflatten(1, (HEADS, SIZE))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("prompt, slots, decay", [(9, 9, 1.0), (5, 12, 0.0), (7, 10, 0.9)])
def test_equals_the_reference_token_by_token(
    option: HeadOption, prompt: int, slots: int, decay: float
) -> None:
    query, key, value = sequence(prompt + 190, seed=prompt)
    dense = DenseAttention.compute(query, key, value, prompt, GRID)
    before = [tensor.clone() for tensor in (dense.logits, dense.probs, dense.out)]
    got = attend_with_option(dense, option, slots, decay)
    wanted = token_by_token(query, key, value, option, prompt, slots, decay)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    one = attend_with_option(dense, option, slots, decay, slice(1, 2))
    torch.testing.assert_close(one, wanted[:, 1:2], rtol=1e-4, atol=1e-5)
    for tensor, same in zip((dense.logits, dense.probs, dense.out), before, strict=True):
        assert torch.equal(tensor, same)


def test_enough_slots_is_full_attention() -> None:
    query, key, value = sequence(100, seed=1)
    dense = DenseAttention.compute(query, key, value, 10, GRID)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    full = attend_with_option(dense, window(90), 10)
    torch.testing.assert_close(full.flatten(1, 2), expected[:, :, 10:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attend_with_option(dense, scored(66, GRID), 34), full)


def test_a_token_that_had_all_the_attention_can_leave() -> None:
    """exp() of what is left would underflow beside the token that was evicted."""
    query, key, value = sequence(80, seed=2)
    key[:, :, 12] *= 400
    dense = DenseAttention.compute(query, key, value, 10, GRID)
    for option in (window(16), HeadOption(Rule(-1, 20, True), 30, 6)):
        got = attend_with_option(dense, option, 10)
        assert got.isfinite().all()
        torch.testing.assert_close(
            got, token_by_token(query, key, value, option, 10, 10, 1.0), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("side", [8, 16, 24, 32])
def test_the_menu_is_valid_for_any_prompt(side: int) -> None:
    from ssd_export.policy.table import check_group

    grid = Grid(side, side)
    for option in menu(grid):
        for prompt_slots in (1, 64):
            check_group(
                HeadGroup(option.rule, prompt_slots + option.image_slots, option.evict_every, 1),
                prompt_slots,
                grid,
            )
    assert len(set(menu(grid))) == len(menu(grid))
