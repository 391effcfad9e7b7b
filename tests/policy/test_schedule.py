"""The schedule of evictions against caches that are filled token by token."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.config import Grid
from ssd_export.policy.schedule import (
    EvictionKind,
    eviction_steps,
    full_before,
    rooms,
    tokens_evicted,
)
from ssd_export.policy.table import KEEP, HeadGroup, PolicyTable, Rule

GRID, PROMPT_SLOTS = Grid(4, 6), 5
RANKED = Rule(-1, 0, True)
GROUPS = st.lists(
    st.tuples(st.integers(1, 24), st.integers(1, 6), st.integers(1, 3)).map(
        lambda one: HeadGroup(RANKED, PROMPT_SLOTS + one[0], min(one[1], one[0]), one[2])
    ),
    min_size=1,
    max_size=3,
)


def table_of(groups: list[HeadGroup]) -> PolicyTable:
    heads = sum(group.num_heads for group in groups)
    return PolicyTable(
        "x", 0.5, PROMPT_SLOTS, 1.0, GRID, (tuple(groups),), (tuple(range(heads)),), ()
    )


def filled(group: HeadGroup, length: int) -> tuple[set[int], int]:
    """The steps before which a head is full, and the tokens it drops: every step writes a token,
    and a full head makes room first.
    """
    held, full, dropped = length, set(), 0
    for step in range(1, GRID.num_tokens):
        if held == group.num_slots:
            full.add(step)
            held -= group.evict_every
            dropped += group.evict_every
        held += 1
    return full, dropped


@settings(max_examples=150)
@given(GROUPS, st.integers(1, PROMPT_SLOTS), st.integers(1, PROMPT_SLOTS))
def test_counted_token_by_token(groups: list[HeadGroup], length: int, other: int) -> None:
    table, lengths = table_of(groups), (length, other)
    full = [set().union(*(filled(group, own)[0] for own in lengths)) for group in groups]
    for group, wanted in zip(groups, full, strict=True):
        kind = EvictionKind(group.num_slots, group.evict_every)
        assert full_before(table, kind, lengths) == wanted
    between = [steps for group, steps in zip(groups, full, strict=True) if group.evict_every > 1]
    assert eviction_steps(table, lengths) == set().union(*between)
    dropped = sum(group.num_heads * filled(group, length)[1] for group in groups)
    assert tokens_evicted(table, length) == dropped
    due = set().union(*full)
    for step, room in enumerate(rooms(table, lengths)):
        later = [end for end in range(step + 1, GRID.num_tokens) if end in due]
        assert room == min([*later, GRID.num_tokens]) - step


def test_a_full_cache_drops_nothing() -> None:
    table = table_of([HeadGroup(KEEP, PROMPT_SLOTS + GRID.num_tokens, 1, 2)])
    assert eviction_steps(table, [1, PROMPT_SLOTS]) == frozenset()
    assert tokens_evicted(table, PROMPT_SLOTS) == 0
    assert rooms(table, [PROMPT_SLOTS]) == list(range(GRID.num_tokens, 0, -1))
