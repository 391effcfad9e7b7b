"""The torch reference equals the oracle slot for slot, plain attention, and the masked full
cache.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_export.cache.attention import decode_attention, fill_from_prompt, prefill_attention
from ssd_export.cache.state import GroupState
from ssd_export.errors import UserError
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import HeadGroup, Rule, check_group
from ssd_export.verify.tolerances import TOLERANCES
from tests.cases import (
    CASES,
    INT8_CASES,
    Case,
    Inputs,
    assert_matches_oracle,
    expected,
    inputs,
)

BY_NAME = {case.name: case for case in CASES}
TIGHT = TOLERANCES["float32"].op


class Reference:
    """The torch reference as a backend of the case table."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype
        self.data = Inputs(
            **{name: torch.from_numpy(array) for name, array in vars(inputs(case)).items()}
        )
        self.state = GroupState.empty(
            case.rows, case.group, case.head_dim, dtype, kv_dtype=case.kv_dtype
        )

    def prefill(self) -> tuple[np.ndarray, np.ndarray | None]:
        data = self.data
        prompt = (data.prompt_query, data.prompt_key, data.prompt_value)
        query, key, value = (part.to(self.dtype) for part in prompt)
        self.prompt_out, scores = prefill_attention(query, key, value, data.prompt_length)
        fill_from_prompt(self.state, key, value, scores, data.prompt_length)
        return self.held()

    def step(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        data = self.data
        query, key, value = (
            array[index].to(self.dtype) for array in (data.query, data.key, data.value)
        )
        out = decode_attention(
            query,
            key,
            value,
            self.state,
            self.case.policy,
            data.prompt_length,
            data.prompt_length + index,
        )
        return out.float().numpy(), *self.held()

    def held(self) -> tuple[np.ndarray, np.ndarray | None]:
        score = self.state.score
        return self.state.position.numpy().copy(), None if score is None else score.numpy().copy()


def dense_attention(
    case: Case, data: Inputs, row: int, index: int, kept: Tensor | None = None
) -> Tensor:
    """A step's attention [H*G, D] over all tokens of a full cache, float64; kept [H, tokens] masks
    them.
    """
    length = case.prompt_lengths[row]
    parts = ((data.prompt_key, data.key), (data.prompt_value, data.value))
    key, value = (
        torch.cat([prompt[row, :, :length], decode[: index + 1, row].transpose(0, 1)], dim=1)
        .double()
        .repeat_interleave(case.query_group_size, dim=0)
        for prompt, decode in parts
    )
    logits = torch.einsum("hd,htd->ht", data.query[index, row].double(), key) / case.head_dim**0.5
    if kept is not None:
        mask = torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, -torch.inf)
        logits = logits + mask.repeat_interleave(case.query_group_size, dim=0)
    return torch.einsum("ht,htd->hd", logits.softmax(-1), value)


def kept_tokens(position: np.ndarray, length: int) -> Tensor:
    """Bool [H, length]: which positions the slots [H, S] hold."""
    kept = torch.zeros(position.shape[0], length, dtype=torch.bool)
    for head, held in enumerate(position):
        kept[head, torch.from_numpy(held[held >= 0]).long()] = True
    return kept


@pytest.mark.parametrize("case", CASES + INT8_CASES, ids=lambda case: case.name)
def test_reference_equals_the_oracle_slot_for_slot(case: Case) -> None:
    check_group(case.group, case.prompt_slots, case.grid)
    assert_matches_oracle(case, Reference(case))


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_prefill_equals_the_oracle_and_leaves_padding_empty(case: Case) -> None:
    backend = Reference(case)
    position, _ = backend.prefill()
    for row, heads in enumerate(expected(replace(case, steps=0)).prompt_out):
        for head, wanted in enumerate(heads):
            given_out = backend.prompt_out[row, head, : len(wanted)].numpy()
            np.testing.assert_allclose(given_out, wanted, rtol=TIGHT, atol=TIGHT)
        assert (position[row, :, case.prompt_lengths[row] :] == -1).all()
    assert torch.isfinite(backend.prompt_out).all()


def test_no_case_hangs_on_a_near_tie() -> None:
    assert min(expected(case).smallest_gap for case in CASES) > 20 * TIGHT
    assert sum(expected(case).num_evictions for case in CASES) > 1000


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    prompt_slots = draw(st.integers(1, 8))
    columns = sum(1 << column for column in draw(st.sets(st.integers(0, 23), max_size=2)))
    rule = Rule(
        draw(st.integers(-1, 6)),
        draw(st.integers(0, 10)),
        draw(st.booleans()),
        columns,
        draw(st.booleans()),
    )
    evict_every = draw(st.sampled_from((1, 2, 5, 6, 13, 24)))
    least = max(prompt_slots + 1, rule.num_protected(prompt_slots, GRID) + evict_every)
    lengths = draw(st.lists(st.integers(1, prompt_slots), min_size=1, max_size=3))
    return Case(
        "random",
        rule,
        least + draw(st.integers(0, 9)),
        evict_every,
        score_decay=draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))),
        num_heads=draw(st.integers(1, 3)),
        query_group_size=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((1, 3, 8))),
        prompt_slots=prompt_slots,
        prompt_lengths=tuple(lengths),
        steps=draw(st.integers(1, 70)),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=120)
@given(random_cases())
def test_random_rules_equal_the_oracle(case: Case) -> None:
    check_group(case.group, case.prompt_slots, case.grid)
    assume(expected(case).smallest_gap > TIGHT)
    assert_matches_oracle(case, Reference(case))


@pytest.mark.parametrize("name", ["full", "full-gqa"])
def test_full_equals_plain_causal_attention_to_the_last_token(name: str) -> None:
    case = replace(BY_NAME[name], steps=GRID.num_tokens - 1)
    backend = Reference(case)
    backend.prefill()
    for index in range(case.steps):
        out, position, _ = backend.step(index)
        if index % 25 == 0 or index == case.steps - 1:
            for row in range(case.rows):
                wanted = dense_attention(case, backend.data, row, index)
                np.testing.assert_allclose(out[row], wanted.numpy(), rtol=TIGHT, atol=TIGHT)
    held = (position >= 0).sum(-1)
    assert (held == backend.data.prompt_length.numpy()[:, None] + case.steps).all(), (
        "nothing may be evicted"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_policy_is_the_full_cache_with_a_mask(case: Case) -> None:
    """The strongest oracle: what was not kept is -inf in an additive mask over a cache that never
    forgets.
    """
    backend = Reference(case)
    backend.prefill()
    for index in range(case.steps):
        out, position, _ = backend.step(index)
        for row, length in enumerate(case.prompt_lengths):
            kept = kept_tokens(position[row], length + index + 1)
            assert kept[:, -1].all(), "a token attends to itself"
            wanted = dense_attention(case, backend.data, row, index, kept)
            np.testing.assert_allclose(out[row], wanted.numpy(), rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("num_slots", [6, 9, 30, 64])
def test_evicting_every_step_by_position_is_a_ring_buffer(num_slots: int) -> None:
    case = Case("ring", Rule(-1, 0, False), num_slots, prompt_lengths=(5, 2), steps=150, seed=3)
    backend = Reference(case)
    backend.prefill()
    for index in range(case.steps):
        _, position, _ = backend.step(index)
        for row, length in enumerate(case.prompt_lengths):
            ring = num_slots - length
            wanted = np.full(num_slots, -1)
            wanted[:length] = np.arange(length)
            for token in range(max(0, index + 1 - ring), index + 1):
                wanted[length + token % ring] = length + token
            np.testing.assert_array_equal(
                position[row], np.broadcast_to(wanted, position[row].shape)
            )


@pytest.mark.parametrize(
    "name", ["scored-gqa-2", "h2o-4-sinks-every-6", "margin-columns", "tova", "headkv"]
)
def test_the_order_of_slots_is_free(name: str) -> None:
    case = BY_NAME[name]
    plain, shuffled = Reference(case), Reference(case)
    plain.prefill(), shuffled.prefill()
    generator = torch.Generator().manual_seed(0)
    for index in range(case.steps):
        if index % 7 == 3:
            order = torch.rand(shuffled.state.position.shape, generator=generator).argsort(-1)
            wide, state = order[..., None].expand_as(shuffled.state.key), shuffled.state
            score = None if state.score is None else state.score.gather(-1, order)
            shuffled.state = GroupState(
                state.key.gather(2, wide),
                state.value.gather(2, wide),
                state.position.gather(-1, order),
                score,
            )
        out, position, _ = plain.step(index)
        other_out, other_position, _ = shuffled.step(index)
        np.testing.assert_array_equal(np.sort(position), np.sort(other_position))
        np.testing.assert_allclose(out, other_out, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["full-gqa", "window-every-24", "margin-columns"])
def test_half_precision_holds_the_same_slots(name: str, dtype: torch.dtype) -> None:
    assert_matches_oracle(
        BY_NAME[name], Reference(BY_NAME[name], dtype), str(dtype).removeprefix("torch.")
    )


R9_RULES = [
    (Rule(-1, 0, False), 6),
    (Rule(-1, 0, True), 24),
    (Rule(-1, 9, True), 1),
    (Rule(4, 7, True), 5),
    (Rule(0, 12, True), 6),
    (Rule(2, 0, True, 1 << 3), 1),
    (Rule(-1, 0, False, 1 | 1 << 5), 6),
    (Rule(-1, 9, True, age_quota=True), 5),
    (Rule(2, 9, False, age_quota=True), 1),
]


def protected_tokens(rule: Rule, length: int, newest: int) -> set[int]:
    sinks = range(length if rule.num_sinks < 0 else rule.num_sinks)
    recent = range(max(newest - rule.num_recent + 1, 0), newest)
    pinned = (
        token
        for token in range(length, newest)
        if rule.pinned_columns >> (token - length) % GRID.width & 1
    )
    return {token for token in (*sinks, *recent, *pinned) if token < newest}


def loses_a_protected_token(rule: Rule, num_slots: int, evict_every: int) -> bool:
    case = Case(
        "r9",
        rule,
        num_slots,
        evict_every,
        num_heads=1,
        head_dim=1,
        prompt_lengths=(5,),
        steps=GRID.num_tokens - 1,
    )
    backend = Reference(case)
    backend.prefill()
    for index in range(case.steps):
        _, position, _ = backend.step(index)
        if not protected_tokens(rule, 5, newest=5 + index) <= set(position.ravel().tolist()):
            return True
    return False


@pytest.mark.parametrize("rule, evict_every", R9_RULES)
def test_r9_is_exact_on_both_sides(rule: Rule, evict_every: int) -> None:
    least = rule.num_protected(5, GRID) + evict_every
    check_group(HeadGroup(rule, least, evict_every, 1), 5, GRID)
    assert not loses_a_protected_token(rule, least, evict_every)
    with pytest.raises(UserError, match=f"image slots >= {least - 5}"):
        check_group(HeadGroup(rule, least - 1, evict_every, 1), 5, GRID)
    assert loses_a_protected_token(rule, least - 1, evict_every)


def test_a_prompt_must_leave_a_slot() -> None:
    case = Case("no room", Rule(-1, 0, False), num_slots=5)
    with pytest.raises(ValueError, match="needs more than 5 cache slots"):
        Reference(case).prefill()
