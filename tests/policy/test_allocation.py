"""ssd-auto's allocation: against exhaustive search, its budget, its groups, and what it
predicts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.model.families import janus
from ssd_export.model.families.janus import GRID
from ssd_export.policy.allocation import allocate
from ssd_export.policy.costs import predicted_error
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy, policy_from_head_options
from ssd_export.policy.table import HeadOption, Rule
from tests.policy.test_make import GQA

SIZES = (16, 32, 64, 128, 256)
MENU = (
    *(HeadOption(Rule(-1, 0, False), size, 1) for size in SIZES),
    *(HeadOption(Rule(-1, size // 2, True), size, min(24, size // 4)) for size in SIZES),
    HeadOption(Rule(-1, 0, False), GRID.num_tokens, 1),
)


ELIGIBLE = range(len(SIZES), len(MENU))  # no windows


def head_map(num_layers: int, num_heads: int, seed: int = 0) -> HeadMap:
    """Random costs that fall with the size, with a scale and a best option for each head."""
    rng = np.random.default_rng(seed)
    costs = np.empty((num_layers, num_heads, len(MENU)))
    for layer, head in product(range(num_layers), range(num_heads)):
        scale, decay = 10 ** rng.uniform(-4, -1), rng.uniform(0.5, 2)
        liking = {True: rng.uniform(0.2, 2), False: 1.0}
        for index, option in enumerate(MENU):
            rest = 1 - option.image_slots / GRID.num_tokens
            costs[layer, head, index] = (
                scale * liking[option.rule.by_score] * rest * option.image_slots**-decay
            )
    return HeadMap(
        janus.NAME,
        GRID,
        num_layers,
        num_heads,
        num_heads,
        64,
        metric=((0.5,) * num_heads,) * num_layers,
        threshold=0.2,
        cost_options=MENU,
        costs=tuple(tuple(map(tuple, layer)) for layer in costs.tolist()),
    ).validate()


def best_by_trying_everything(costs: HeadMap, total: int, groups: int) -> float:
    table = np.asarray(costs.costs).reshape(-1, len(MENU))
    best = np.inf
    for choice in product(ELIGIBLE, repeat=len(table)):
        layers = [
            choice[i : i + costs.num_kv_heads] for i in range(0, len(choice), costs.num_kv_heads)
        ]
        if sum(MENU[c].image_slots for c in choice) <= total and all(
            len(set(layer)) <= groups for layer in layers
        ):
            best = min(best, sum(row[c] for row, c in zip(table, choice)))
    return best


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("budget", [0.06, 0.1, 0.2, 0.35])
def test_not_far_from_the_best_of_all_choices(groups: int, budget: float) -> None:
    """A price finds the convex hull only, which is coarse with four heads."""
    for seed in range(3):
        costs = head_map(2, 2, seed)
        found = allocate(costs, budget, groups)
        best = best_by_trying_everything(costs, int(budget * GRID.num_tokens * 4), groups)
        assert best <= found.cost * (1 + 1e-9) and found.cost <= 2 * best


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 0.35])
def test_next_to_the_lower_bound_with_many_heads(budget: float) -> None:
    """For any price p, the sum over heads of min(cost + p x slots) less p x all slots is no more
    than the best cost.
    """
    costs = head_map(12, 3, seed=7)
    table = np.asarray(costs.costs).reshape(-1, len(MENU))[:, ELIGIBLE]
    slots = np.array([MENU[index].image_slots for index in ELIGIBLE])
    total = int(budget * GRID.num_tokens * 36)
    bound = max(
        (table + p * slots).min(axis=1).sum() - p * total for p in np.geomspace(1e-9, 1e-1, 400)
    )
    assert bound <= allocate(costs, budget, groups=3).cost <= 1.05 * bound


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_keeps_the_budget_and_uses_it(groups: int) -> None:
    costs, last = head_map(6, 8), np.inf
    for budget in (0.03, 0.05, 0.1, 0.2, 0.5, 0.9):
        found = allocate(costs, budget, groups)
        limit = budget * GRID.num_tokens * 48
        assert found.image_slots == sum(
            option.image_slots for layer in found.heads for option in layer
        )
        assert found.image_slots <= limit and (
            found.image_slots > 0.93 * limit or groups == 1 or found.cost == 0
        )
        assert max(len(set(layer)) for layer in found.heads) <= groups
        assert found.cost <= last
        last = found.cost
    assert allocate(costs, 1.0).cost == 0


RANKED_SIZES = (16, 32, 64, 128)


def of_costs(layers: list[list[list[float]]]) -> HeadMap:
    """A map of the costs of RANKED_SIZES: [layers][heads][sizes]."""
    menu = tuple(HeadOption(Rule(-1, 4, True), size, 4) for size in RANKED_SIZES)
    made = head_map(len(layers), len(layers[0]))
    costs = tuple(tuple(map(tuple, layer)) for layer in layers)
    return replace(made, cost_options=menu, costs=costs).validate()


def test_the_last_slot_is_spent() -> None:
    """Two equal heads do not both fit into what the price leaves, and one does exactly."""
    steep, flat = [90.0, 60.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]
    costs = of_costs([[steep, flat, flat]])
    found = allocate(costs, (64 + 64 + 16 + 0.01) / (576 * 3))
    assert found.image_slots == 64 + 64 + 16 and found.cost == 9.0


def test_what_is_left_goes_where_a_slot_saves_most() -> None:
    """Two small gains at 16 slots each are worth more than the greater one at 48."""
    large, once, twice = [60.0] * 3 + [0.0], [10.0, 10.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]
    costs = of_costs([[large], [once], [twice], [twice]])
    found = allocate(costs, (4 * 16 + 48 + 0.01) / (576 * 4))
    assert found.cost == 60.0 + 10.0 and found.image_slots == 4 * 16 + 2 * 16


def test_more_groups_never_cost_much_more() -> None:
    costs = head_map(6, 8, 5)
    for budget in (0.05, 0.1, 0.2):
        one, two, three = (allocate(costs, budget, groups).cost for groups in (1, 2, 3))
        assert three <= two * 1.02 and two <= one * 1.02


def test_the_same_every_time_and_whatever_the_scale() -> None:
    costs = head_map(4, 4)
    found = allocate(costs, 0.1)
    assert found == allocate(costs, 0.1)
    tiny = tuple(
        tuple(tuple(value * 1e-9 for value in head) for head in layer) for layer in costs.costs
    )
    assert allocate(replace(costs, costs=tiny), 0.1).heads == found.heads


def test_heads_get_what_they_need() -> None:
    """A head that reads far gets slots, one that reads nothing gets few."""
    flat, steep = [1e-9] * len(MENU), [0.5, 0.4, 0.3, 0.2, 0.1] * 2 + [0.0]
    soon_content = [0.5] * 5 + [0.5, 0.4, 1e-5, 1e-6, 1e-7, 0.0]
    costs = replace(head_map(1, 3), costs=((tuple(flat), tuple(steep), tuple(soon_content)),))
    layer = allocate(costs, 0.2, groups=3).heads[0]
    assert [option.image_slots for option in layer] == [16, 256, 64]


def test_no_head_gets_a_window_however_cheap_it_looks() -> None:
    costs = head_map(2, 3)
    free = tuple(
        tuple((0.0,) * len(SIZES) + head[len(SIZES) :] for head in layer) for layer in costs.costs
    )
    found = allocate(replace(costs, costs=free), 0.1)  # too little for a head that keeps everything
    assert all(option.rule.by_score for layer in found.heads for option in layer)
    with pytest.raises(UserError, match="windows only"):
        allocate(
            replace(
                costs,
                cost_options=MENU[:3],
                costs=tuple(tuple(h[:3] for h in layer) for layer in costs.costs),
            ),
            0.2,
        )


def test_table_and_prediction() -> None:
    costs = replace(
        head_map(3, 2), num_heads=6, hidden_size=GQA.hidden_size, metric=((0.5,) * 6,) * 3
    )
    found = allocate(costs, 0.1)
    table = make_policy("ssd-auto", GQA, budget=0.1, allocation=found.heads)
    assert table.image_slots_mean <= 57.6
    assert predicted_error(table, costs) == pytest.approx(found.cost)
    others = [
        make_policy("streaming-llm", GQA, budget=0.1),
        make_policy("h2o", GQA, budget=0.1, evict_every=24),
        make_policy("ssd-row", GQA, budget=0.1, head_map=costs),
    ]
    assert found.cost < min(predicted_error(other, costs) for other in others)
    assert predicted_error(make_policy("full", GQA, budget=1), costs) == 0


def test_prediction_is_between_the_sizes_of_the_menu() -> None:
    costs = replace(
        head_map(3, 2), num_heads=6, hidden_size=GQA.hidden_size, metric=((0.5,) * 6,) * 3
    )

    def window(size: int) -> float:
        options = [[HeadOption(Rule(-1, 0, False), size, 1)] * 2] * 3
        return predicted_error(policy_from_head_options(GQA, "x", 0.1, 64, options), costs)

    assert window(64) > window(100) > window(128) and window(8) == window(16)
    assert window(128) == pytest.approx(np.asarray(costs.costs)[..., 3].sum())


def test_what_cannot_be_allocated() -> None:
    with pytest.raises(UserError, match="calibrate"):
        allocate(replace(head_map(1, 2), cost_options=(), costs=()), 0.2)
    with pytest.raises(UserError, match=r"16 image slots; use budget >= 0.0278"):
        allocate(head_map(1, 2), 0.02)
    assert allocate(head_map(1, 2), 0.0278).image_slots == 32
    with pytest.raises(UserError, match="outside 1..3"):
        allocate(head_map(1, 2), 0.2, groups=4)
