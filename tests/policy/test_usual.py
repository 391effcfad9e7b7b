"""Tables as `export` makes them: heads evict together where that is predicted to be harmless."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.find import DEMOS
from ssd_export.policy.allocation import allocate
from ssd_export.policy.costs import predicted_error
from ssd_export.policy.make import make_policy
from ssd_export.policy.presets import POLICIES
from ssd_export.policy.table import PolicyTable
from ssd_export.policy.usual import EACH_FOR_ITSELF, MOST_LOSS, usual_policy
from tests.policy.test_lookahead_tables import check_fits, own_map
from tests.policy.test_make import BUDGETED, GQA, JANUS_1B
from tests.policy.test_make import own_map as built_in_map


def by_type(name: str, budget: float, **options) -> PolicyTable:
    return usual_policy(
        name, JANUS_1B, budget=budget, head_map=built_in_map(JANUS_1B), groups=3, **options
    )


@pytest.mark.parametrize("budget", [0.5, 0.2, 0.17])
def test_spatial_and_semantic_heads_evict_a_third_of_a_grid_row_apart(budget: float) -> None:
    table = by_type("ssd-row", budget)
    check_fits(table, 8)
    assert table == make_policy(
        "ssd-row", JANUS_1B, budget=budget, head_map=built_in_map(JANUS_1B), lookahead=8
    )


@pytest.mark.parametrize("budget", [0.16, 0.1, 0.08])
def test_less_than_four_grid_rows_of_slots_evict_each_for_itself(budget: float) -> None:
    assert by_type("ssd-row", budget).lookahead is None


@pytest.mark.parametrize("name", sorted(set(BUDGETED) - {"ssd-row"}))
def test_policies_of_others_stay_as_published(name: str) -> None:
    assert by_type(name, 0.2) == make_policy(
        name, JANUS_1B, budget=0.2, head_map=built_in_map(JANUS_1B)
    )
    assert not POLICIES[name].evicts_together


def test_numbers_that_are_asked_for_come_first() -> None:
    assert by_type("ssd-row", 0.2, window=100).lookahead == 4, "100 is no multiple of 8"
    assert by_type("ssd-row", 0.2, window=99).lookahead is None
    assert (
        by_type("ssd-row", 0.2, window=99).layers
        == by_type("ssd-row", 0.2, window=99, lookahead=EACH_FOR_ITSELF).layers
    )
    assert by_type("ssd-row", 0.2, lookahead=16).lookahead == 16
    with pytest.raises(UserError, match="window=100 is no multiple of lookahead=16"):
        by_type("ssd-row", 0.2, window=100, lookahead=16)
    assert by_type("ssd-row", 1.0) == by_type("ssd-row", 1.0, lookahead=EACH_FOR_ITSELF)
    with pytest.raises(UserError, match="is outside"):
        by_type("ssd-row", 0.0)


@pytest.mark.parametrize(
    ("model", "budget", "lookahead"),
    [("demo", 0.2, 8), ("demo", 0.1, 8), ("demo", 0.07, 4), ("demo-classes", 0.1, 4)],
)
def test_an_allocation_evicts_together_where_little_is_lost(
    model: str, budget: float, lookahead: int
) -> None:
    checkpoint = open_checkpoint(DEMOS[model])
    head_map = checkpoint.head_map(None)
    assert head_map is not None
    usual, alone = (
        usual_policy(
            "ssd-auto", checkpoint.config, budget=budget, head_map=head_map, lookahead=asked
        )
        for asked in (None, EACH_FOR_ITSELF)
    )
    check_fits(usual, lookahead)
    assert alone.lookahead is None
    assert predicted_error(usual, head_map) <= MOST_LOSS * predicted_error(alone, head_map)
    if lookahead == 4 and budget == 0.1:
        lost = allocate(head_map, budget, lookahead=8).cost / allocate(head_map, budget).cost
        assert lost > MOST_LOSS, "the larger one is refused for its loss"


def test_a_narrow_grid_has_no_common_steps() -> None:
    narrow = replace(own_map(0), grid=Grid(192, 3))
    config = replace(GQA, grid=Grid(192, 3))
    table = usual_policy("ssd-auto", config, budget=0.2, head_map=narrow)
    assert table.lookahead is None


def test_an_allocation_without_costs_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="ssd-auto needs a head map with costs"):
        usual_policy("ssd-auto", JANUS_1B, budget=0.2, head_map=built_in_map(JANUS_1B))
