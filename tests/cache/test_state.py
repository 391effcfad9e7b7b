"""A group's slots: what an empty state holds, what a copy shares, what is forgotten, and the bytes
of all tensors.
"""

from __future__ import annotations

import pytest
import torch

from ssd_export.cache.state import EMPTY, GroupState
from ssd_export.policy.table import HeadGroup, Rule

SCORED, WINDOW = Rule(-1, 0, True), Rule(-1, 0, False)
ROWS, HEADS, SLOTS, HEAD_DIM = 2, 3, 7, 4
PER_SLOT = ROWS * HEADS * SLOTS


def state_of(rule: Rule, **changes: object) -> GroupState:
    return GroupState.empty(ROWS, HeadGroup(rule, SLOTS, 1, HEADS), HEAD_DIM, **changes)


@pytest.mark.parametrize(
    ("rule", "changes", "each"),
    [
        (WINDOW, {}, 2 * HEAD_DIM * 4 + 4),
        (SCORED, {}, 2 * HEAD_DIM * 4 + 4 + 4),
        (SCORED, {"dtype": torch.float16}, 2 * HEAD_DIM * 2 + 4 + 4),
        (WINDOW, {"kv_dtype": "int8"}, 2 * HEAD_DIM + 4 + 2 * 4),
        (SCORED, {"dtype": torch.bfloat16, "kv_dtype": "int8"}, 2 * HEAD_DIM + 4 + 4 + 2 * 4),
    ],
)
def test_bytes_of_every_tensor(rule: Rule, changes: dict, each: int) -> None:
    """Keys, values, positions, scores where the rule ranks by them, scales where keys are int8."""
    assert state_of(rule, **changes).num_bytes == PER_SLOT * each


def test_nothing_is_held_and_nothing_is_undefined() -> None:
    state = state_of(SCORED, kv_dtype="int8")
    assert (state.position == EMPTY).all()
    for tensor in (state.key, state.value, state.score, state.key_scale, state.value_scale):
        assert tensor is not None and (tensor == 0).all()
    assert state.value.data_ptr() != state.key.data_ptr()


def test_every_token_is_forgotten_in_place() -> None:
    state = state_of(SCORED)
    places = [tensor.data_ptr() for tensor in (state.key, state.position, state.score)]
    state.position.fill_(3)
    state.score.fill_(0.5)
    state.reset()
    assert (state.position == EMPTY).all() and (state.score == 0).all()
    assert places == [tensor.data_ptr() for tensor in (state.key, state.position, state.score)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_shares_nothing(dtype: torch.dtype) -> None:
    """In the same dtype, too, where a conversion alone would copy nothing."""
    state = state_of(SCORED)
    copy = state.copied(dtype)
    assert copy.key.dtype == copy.value.dtype == dtype
    for tensor in (copy.key, copy.value, copy.position, copy.score):
        tensor.fill_(9)
    assert (state.key == 0).all() and (state.value == 0).all()
    assert (state.position == EMPTY).all() and (state.score == 0).all()
    assert state_of(WINDOW).copied(dtype).score is None
