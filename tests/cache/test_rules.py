"""R3 to R6 one at a time, on slots small enough to read."""

from __future__ import annotations

import math

import torch

from ssd_export.cache.attention import evict_full_heads
from ssd_export.cache.rules import evict, retention, slot_for_new_token
from ssd_export.cache.state import GroupState
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule

INF = math.inf


def retained(
    positions: list[int], scores: list[float], rule: Rule, prompt_length: int, newest: int
) -> list[float]:
    position = torch.tensor(positions, dtype=torch.int32)[None, None]
    score = torch.tensor(scores)[None, None]
    values = retention(
        position, score, rule, torch.tensor([prompt_length]), torch.tensor([newest]), GRID.width
    )
    assert values.dtype == torch.float32
    return values.flatten().tolist()


def test_r3_sinks_recent_and_rank() -> None:
    positions, scores = [7, 0, 3, 6, 1], [0.5, 0.25, 2.0, 1.0, 0.125]
    assert retained(positions, scores, Rule(0, 0, True), 2, 8) == scores
    assert retained(positions, scores, Rule(0, 0, False), 2, 8) == positions
    assert retained(positions, scores, Rule(-1, 0, True), 2, 8) == [0.5, INF, 2.0, 1.0, INF]
    assert retained(positions, scores, Rule(4, 0, True), 2, 8) == [0.5, INF, INF, 1.0, INF]
    assert retained(positions, scores, Rule(0, 3, True), 2, 8) == [INF, 0.25, 2.0, INF, 0.125]
    assert retained(positions, scores, Rule(0, 1, True), 2, 8) == scores, (
        "the new token is the recent one"
    )


def test_r3_pins_grid_columns_of_image_tokens_only() -> None:
    length = 3
    positions = [0, 2, length, length + 1, length + 23, length + 24, length + 25]
    pinned = retained(positions, [0.5] * 7, Rule(0, 0, True, 1), length, 40)
    assert pinned == [0.5, 0.5, INF, 0.5, 0.5, INF, 0.5]
    pinned = retained(positions, [0.5] * 7, Rule(0, 0, True, 1 << 23 | 1 << 1), length, 40)
    assert pinned == [0.5, 0.5, 0.5, INF, INF, 0.5, INF]


def test_r3_with_an_age_quota_takes_turns_between_the_older_and_the_newer_half() -> None:
    positions, scores = [7, 1, 3, 6, 4, 8, -1], [0.5, 9.0, 2.0, 0.25, 1.0, 0.0, 0.0]

    def ranked(newest: int, *, by_score: bool) -> list[float]:
        rule = Rule(-1, newest - 7, by_score, age_quota=True)  # protects 1 and 8
        return retained(positions, scores, rule, 2, newest)

    # 3 and 4 are the older half, 6 and 7 the newer
    assert ranked(10, by_score=True) == [3, INF, 2, 1, 0, INF, INF]
    assert ranked(9, by_score=True) == [2, INF, 3, 0, 1, INF, INF]
    assert ranked(10, by_score=False) == [3, INF, 0, 1, 2, INF, INF]


def test_the_half_that_leads_holds_the_odd_token_and_ties_go_to_the_lower_slot() -> None:
    rule, positions, scores = Rule(0, 0, True, age_quota=True), [4, 2, 0, 3, 1], [1.0] * 5
    assert retained(positions, scores, rule, 1, 6) == [1, 0, 2, 3, 4]  # 0, 1 and 2 lead
    assert retained(positions, scores, rule, 1, 5) == [0, 2, 1, 4, 3]  # 4, 3 and 2 lead


def test_r3_takes_each_rows_own_prompt_length() -> None:
    position = torch.arange(6, dtype=torch.int32).expand(2, 1, 6)
    length, newest = torch.tensor([1, 3]), torch.tensor([6, 5])
    values = retention(
        position, torch.zeros(2, 1, 6), Rule(-1, 2, True), length, newest, GRID.width
    )
    assert values[:, 0].tolist() == [[INF, 0, 0, 0, 0, INF], [INF, INF, INF, 0, INF, INF]]


def test_r4_of_equals_the_lower_slot_is_evicted_first_and_empty_slots_never() -> None:
    assert retained([-1, 4], [9.0, 0.0], Rule(0, 0, True), 1, 5) == [INF, 0.0]
    position = torch.tensor([[[5, 6, 7, -1, 8]]], dtype=torch.int32)
    values = torch.tensor([[[1.0, 2.0, 1.0, INF, 1.0]]])
    assert evict(position, values, 1).flatten().tolist() == [-1, 6, 7, -1, 8]
    assert evict(position, values, 2).flatten().tolist() == [-1, 6, -1, -1, 8]
    assert evict(position, values, 4).flatten().tolist() == [-1] * 5


def test_r6_takes_the_lowest_empty_slot() -> None:
    position = torch.tensor([[[-1, 1, -1], [4, -1, -1], [1, 2, -1]]], dtype=torch.int32)
    assert slot_for_new_token(position).tolist() == [[0, 1, 2]]


def test_r7_evicts_only_full_heads_and_decays_only_their_scores() -> None:
    group = HeadGroup(Rule(0, 0, True), num_slots=3, evict_every=2, num_heads=2)
    state = GroupState.empty(2, group, head_dim=1)
    state.position[:] = torch.tensor([[[0, 1, 2], [0, -1, 2]], [[-1, -1, 2], [2, 1, 0]]])
    state.score[:] = torch.tensor([1.0, 3.0, 2.0])
    evict_full_heads(state, GroupPolicy(group, 0.5, 4), torch.tensor([1, 1]), torch.tensor([3, 3]))
    assert state.position.tolist() == [[[-1, 1, -1], [0, -1, 2]], [[-1, -1, 2], [-1, 1, -1]]]
    assert state.score.tolist() == [
        [[0.5, 1.5, 1.0], [1.0, 3.0, 2.0]],
        [[1.0, 3.0, 2.0], [0.5, 1.5, 1.0]],
    ]
