"""What an option costs a head by the costs of a head map's menu, measured or estimated between
them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.menu import evicts_together
from ssd_export.policy.table import HeadOption, PolicyTable

LEAST_COST = 1e-15
QUARTERS = 4  # options of one kind protect the same quarters of their slots for being recent


class Measured(NamedTuple):
    """A ranking option of the menu. held: mean image tokens of a head that is full; place: in the
    menu.
    """

    held: float
    place: int


def estimated_costs(head_map: HeadMap, option: HeadOption) -> np.ndarray:
    """The cost of an option to every head, float64 [layers, heads]: the map's where it is on the
    menu, else between the options of its kind that hold a few tokens more and fewer.

    The logarithm of the cost is linear in the tokens held. Below what the menu tried of a kind,
    another kind that was tried there stands in; below all, the smallest is taken.
    """
    menu, costs = head_map.cost_options, np.asarray(head_map.costs, np.float64)
    if option.image_slots >= head_map.grid.num_tokens:
        return np.zeros(costs.shape[:2])
    if option in menu:
        return np.asarray(costs[..., menu.index(option)])
    held, kinds = _held(option), _kinds(head_map, option.rule.by_score)
    known = [quarters for quarters, kind in kinds.items() if kind[0].held <= held]
    smallest = min(kinds, key=lambda quarters: kinds[quarters][0].held)
    kind = kinds[min(known or [smallest], key=lambda q: abs(q - _quarters_recent(option)))]
    sizes = [one.held for one in kind]
    above = min(int(np.searchsorted(sizes, held)), len(kind) - 1)
    below = max(above - 1, 0)
    if held >= sizes[above] or below == above:
        return np.asarray(costs[..., kind[above].place])
    part = (held - sizes[below]) / (sizes[above] - sizes[below])
    low, high = (np.maximum(costs[..., kind[at].place], LEAST_COST) for at in (below, above))
    return np.asarray(low ** (1 - part) * high**part)


def choices(head_map: HeadMap, lookahead: int | None) -> tuple[list[HeadOption], np.ndarray]:
    """Options among which ssd-auto chooses, and what each costs every head, float64 [layers, heads,
    options].

    They rank by score, or keep everything. A window costs a head little on average and much in the
    few images in which what it looks for lies further back; the mean over a few calibration images
    does not see them. With windows in the choice, even if for spatial heads alone, the demo model
    lost ten times more at a fifth (docs/heads.md). They stay in the menu: `predicted_error`
    compares other policies by them. With lookahead, options evict together, and none holds fewer
    tokens than the menu tried: its cost would be a guess.
    """
    num_tokens = head_map.grid.num_tokens
    options = [
        option
        for option in head_map.cost_options
        if option.rule.by_score or option.image_slots >= num_tokens
    ]
    if lookahead is not None and options:
        tried = [_held(option) for option in options if option.image_slots < num_tokens]
        fitting = dict.fromkeys(
            fitting
            for option in options
            for fitting in evicts_together(option, lookahead, head_map.grid)
        )
        options = [one for one in fitting if _held(one) >= min(tried, default=0)]
    if not options:
        return [], np.zeros((0, 0, 0))
    return options, np.stack([estimated_costs(head_map, option) for option in options], axis=-1)


def predicted_error(table: PolicyTable, head_map: HeadMap) -> float:
    """The summed cost of all heads under any table of windows and scored sets, from the map's
    menu.
    """
    total = 0.0
    for layer, (groups, order) in enumerate(zip(table.layers, table.head_order)):
        every = [group for group in groups for _ in range(group.num_heads)]
        for head, group in zip(order, every):
            total += float(estimated_costs(head_map, table.option(group))[layer, head])
    return total


def _kinds(head_map: HeadMap, by_score: bool) -> dict[int, list[Measured]]:
    """The menu's options that rank alike and evict, by their recent quarters, small before
    large.
    """
    kinds: dict[int, list[Measured]] = {}
    for index, option in enumerate(head_map.cost_options):
        if option.rule.by_score == by_score and option.image_slots < head_map.grid.num_tokens:
            kinds.setdefault(_quarters_recent(option), []).append(Measured(_held(option), index))
    return {quarters: sorted(kind) for quarters, kind in kinds.items()}


def _held(option: HeadOption) -> float:
    return option.image_slots - (option.evict_every - 1) / 2


def _quarters_recent(option: HeadOption) -> int:
    return round(QUARTERS * option.rule.num_recent / option.image_slots)
