"""Tables that fit lookahead: heads evict before the same steps, within the budget, and at a known
cost.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.errors import UserError
from ssd_export.model.families.janus import GRID
from ssd_export.plan.lookahead import expected_widths
from ssd_export.policy.allocation import allocate
from ssd_export.policy.costs import choices, estimated_costs
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy, policy_from_head_options
from ssd_export.policy.menu import evicts_together, menu, mostly_recent
from ssd_export.policy.presets import POLICIES
from ssd_export.policy.schedule import eviction_steps, rooms
from ssd_export.policy.table import HeadOption, PolicyTable, Rule
from tests.policy.test_allocation import head_map
from tests.policy.test_make import BUDGETED, GQA, policy

LOOKAHEADS = st.integers(2, 24)


def check_fits(table: PolicyTable, lookahead: int) -> None:
    """Every eviction is due a multiple of lookahead after the first one of all heads."""
    assert table.lookahead == lookahead
    for length in (7, 19, table.prompt_slots):
        steps = sorted(eviction_steps(table, [length]))
        assert all((after - before) % lookahead == 0 for before, after in pairwise(steps))
        room = rooms(table, [length])
        ends = [step for step in range(len(room)) if room[step] == 1]
        assert set(ends[:-1]) <= {step - 1 for step in steps}, "nothing else cuts a pass"
    for group in table.groups():
        if group.can_fill(table.prompt_slots, table.grid):
            assert group.evict_every % lookahead == 0
            assert (group.num_slots - table.prompt_slots) % lookahead == 0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(BUDGETED), lookahead=LOOKAHEADS, budget=st.sampled_from([0.1, 0.2, 0.37])
)
def test_every_policy_evicts_together_within_its_budget(
    name: str, lookahead: int, budget: float
) -> None:
    try:
        table = policy(name, budget, lookahead=lookahead)
    except UserError as error:
        assert "use budget >= " in str(error) or "use image slots >= " in str(error)
        return
    check_fits(table, lookahead)
    assert table.image_slots_mean <= budget * 576 + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    lookahead=LOOKAHEADS,
    budget=st.sampled_from([0.1, 0.2, 0.5]),
    groups=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_the_allocation_evicts_together_within_its_budget(
    lookahead: int, budget: float, groups: int, seed: int
) -> None:
    costs = replace(own_map(seed), num_heads=6)
    found = allocate(costs, budget, groups, lookahead)
    assert found.image_slots <= floor(budget * 576 * 6)
    table = make_policy(
        "ssd-auto", GQA, budget=budget, groups=groups, allocation=found.heads, lookahead=lookahead
    )
    check_fits(table, lookahead)
    assert max(map(len, table.layers)) <= groups
    options, _ = choices(costs, lookahead)
    assert {table.option(group) for group in table.groups()} <= set(options)


def own_map(seed: int) -> HeadMap:
    """Random falling costs over the menu that `calibrate` measures."""
    options = menu(GRID)
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-4, -1, (3, 2, 1))
    held = np.array([option.image_slots - (option.evict_every - 1) / 2 for option in options])
    costs = scale * np.maximum(1 - held / 576, 0) * held**-0.7
    return replace(
        head_map(3, 2),
        num_heads=6,
        hidden_size=GQA.hidden_size,
        metric=((0.5,) * 6,) * 3,
        cost_options=options,
        costs=tuple(tuple(map(tuple, layer)) for layer in costs.tolist()),
    ).validate()


def test_without_lookahead_nothing_changes() -> None:
    costs = own_map(0)
    options, found = choices(costs, None)
    eligible = [i for i, o in enumerate(costs.cost_options) if o.rule.by_score or i == 16]
    assert options == [costs.cost_options[index] for index in eligible]
    np.testing.assert_array_equal(found, np.asarray(costs.costs)[..., eligible])
    assert policy("h2o").lookahead is None


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 16), lookahead=LOOKAHEADS)
def test_options_that_evict_together_are_valid_and_near(index: int, lookahead: int) -> None:
    option = menu(GRID)[index]
    for other in evicts_together(option, lookahead, GRID):
        policy_from_head_options(GQA, "x", 1.0, 64, [[other] * 2] * 3, lookahead=lookahead)
        assert abs(other.image_slots - option.image_slots) < lookahead
        assert other.rule.num_recent <= option.rule.num_recent * other.image_slots / (
            option.image_slots
        )
        assert other.evict_every <= max(option.evict_every, lookahead)
    if option.image_slots % lookahead == 0 and option.evict_every % lookahead == 0:
        assert option in evicts_together(option, lookahead, GRID) or (
            option.image_slots < 2 * lookahead
        )


def test_a_cost_lies_between_those_of_its_neighbors_and_none_is_guessed_below_them() -> None:
    costs = own_map(1)
    small, large = mostly_recent(96, GRID), mostly_recent(128, GRID)
    between = HeadOption(replace(small.rule, num_recent=84), 112, 24)
    low, middle, high = (estimated_costs(costs, one) for one in (large, between, small))
    assert (low < middle).all() and (middle < high).all()
    oftener = between._replace(evict_every=8)  # holds more tokens on average
    assert (estimated_costs(costs, oftener) < middle).all()
    # half of the slots recent was tried from 64 slots on: a smaller one costs what the other kind
    # does there, not what 64 slots do
    half = HeadOption(Rule(-1, 24, True), 48, 24)
    assert (estimated_costs(costs, half) > estimated_costs(costs, mostly_recent(64, GRID))).all()
    tried = min(o.image_slots - (o.evict_every - 1) / 2 for o in menu(GRID) if o.rule.by_score)
    for lookahead in range(2, 25):
        options, _ = choices(costs, lookahead)
        assert min(o.image_slots - (o.evict_every - 1) / 2 for o in options) >= tried


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"lookahead": 8}, "evicts nothing, so that it cuts no pass"),
        ("h2o", {"lookahead": 1}, "lookahead=1 is outside 2 .. 64; use 8"),
        ("h2o", {"lookahead": 65}, "lookahead=65 is outside 2 .. 64; use 8"),
        ("h2o", {"lookahead": 8, "evict_every": 12}, "evict_every=12 is no multiple .* 8 or 16"),
        ("h2o", {"lookahead": 8, "evict_every": 3}, "use 8"),
        ("ssd", {"lookahead": 8, "window": 100}, "window=100 is no multiple .* 96 or 104"),
        ("ssd", {"lookahead": 8, "window": 24}, "does not hold the token .* window >= 32"),
        ("h2o", {"lookahead": 64}, "too few to keep 64 and evict 64; use budget >= 0.2223 or a"),
        ("margin", {"lookahead": 24, "budget": 0.1}, "use budget >= "),
    ],
)
def test_what_fits_no_lookahead(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy(name, **options)


def test_an_allocation_that_fits_no_lookahead() -> None:
    with pytest.raises(UserError, match="outside 2 .. 64"):
        allocate(own_map(0), 0.2, lookahead=1)
    with pytest.raises(UserError, match="evicts 48 tokens at a time, 96 .* or a smaller lookahead"):
        allocate(own_map(0), 0.1, lookahead=48)
    heads = allocate(own_map(0), 0.2).heads
    with pytest.raises(UserError, match="are not multiples of lookahead=7; export again"):
        make_policy("ssd-auto", GQA, budget=0.2, allocation=heads, lookahead=7)


def test_right_drafts_are_cut_short_where_lookahead_ends_alone() -> None:
    plain, fitting = (policy("h2o", lookahead=lookahead) for lookahead in (None, 8))
    passes = [len(expected_widths(rooms(table, [19, 19]), 8, 1.0)) for table in (plain, fitting)]
    first = fitting.full_slots - 576 + 112 - 19  # image tokens before the first eviction
    assert passes[1] == -(-first // 8) + -(-(575 - first) // 8) and passes[0] > 400


def test_all_that_is_kept_needs_no_lookahead() -> None:
    table = policy("h2o", 1.0, lookahead=8)
    assert table.lookahead is None
    assert "lookahead has no effect" in table.notes[0]
    assert policy("h2o", 0.2, lookahead=8).full().lookahead is None
    assert all("lookahead" in row.options for row in POLICIES.values() if row.name != "full")
