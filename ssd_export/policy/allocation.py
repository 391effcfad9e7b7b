"""Allocates one option to each KV head by the costs of a head map: the least summed cost at a mean
number of slots.

For each layer at most `groups` of the options that costs.py offers, for each head one of them. With
a price on slots (a Lagrange multiplier) layers are independent, and every subset of the options is
tried; the price is bisected until the slots fit; what is left is spent greedily. Deterministic:
numpy and integers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import floor

import numpy as np

from ssd_export.errors import UserError
from ssd_export.policy.costs import LEAST_COST, choices
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.presets import DEFAULT_GROUPS, MAX_GROUPS
from ssd_export.policy.request import check_lookahead
from ssd_export.policy.sizes import budget_too_small
from ssd_export.policy.table import HeadOption

PRICES = 24  # bisection steps over 12 decades: the price to a millionth


@dataclass(frozen=True)
class Allocation:
    """An allocation. heads: the option of each KV head, [layers][KV heads]; cost: their sum;
    image_slots: of all heads.
    """

    heads: tuple[tuple[HeadOption, ...], ...]
    cost: float
    image_slots: int


def allocate(
    head_map: HeadMap, budget: float, groups: int = DEFAULT_GROUPS, lookahead: int | None = None
) -> Allocation:
    """The options of least summed cost whose image slots are on average at most budget x image
    tokens.

    Args: lookahead: all heads evict before the same steps, so many tokens apart or a multiple.
    Raises: UserError for a map without costs, groups or lookahead out of range and a budget below
    the smallest option.
    """
    if not 1 <= groups <= MAX_GROUPS:
        raise UserError(f"groups={groups} is outside 1..{MAX_GROUPS}; use {DEFAULT_GROUPS}")
    if lookahead is not None:
        check_lookahead(lookahead)
    return _allocate(head_map, budget, groups, lookahead)


def allocate_each_head(head_map: HeadMap, budget: float) -> Allocation:
    """Allocates with any number of options in a layer, to measure what the limit on groups costs.
    No bundle holds it.
    """
    return _allocate(head_map, budget, len(head_map.cost_options), None)


def _allocate(head_map: HeadMap, budget: float, groups: int, lookahead: int | None) -> Allocation:
    if not head_map.cost_options:
        raise UserError(
            "ssd-auto needs a head map with costs and this one has none; run `ssd-export"
            " calibrate`, or use --policy ssd-row"
        )
    grid = head_map.grid
    options, costs = choices(head_map, lookahead)
    if not options:
        raise UserError(
            "the head map's menu has windows only, and ssd-auto chooses among ranked sets;"
            " calibrate again with `ssd-export calibrate`"
        )
    slots = np.array([option.image_slots for option in options])
    total = floor(Fraction(str(budget)) * grid.num_tokens * costs.shape[0] * costs.shape[1])
    if slots.min() * costs.shape[0] * costs.shape[1] > total:
        evicting = "" if lookahead is None else f" that evicts {lookahead} tokens at a time"
        raise budget_too_small(
            budget,
            f"is below the smallest option of the head map{evicting}, {slots.min()} image slots",
            int(slots.min()) / grid.num_tokens,
            "" if lookahead is None else " or a smaller lookahead",
        )
    search = _Search(costs, slots, groups)
    choice = search.spend_rest(search.bisect(total), total)
    heads = tuple(tuple(options[option] for option in layer) for layer in choice)
    return Allocation(heads, search.cost(choice), search.slots_of(choice))


class _Search:
    """Choices are int [layers, heads]: the option of each head."""

    def __init__(self, costs: np.ndarray, slots: np.ndarray, groups: int) -> None:
        self.costs, self.slots = costs, slots
        size = min(groups, len(slots))
        self.subsets = np.array(
            list(combinations(range(len(slots)), size))
        )  # smaller subsets are contained in them

    def cost(self, choice: np.ndarray) -> float:
        return float(np.take_along_axis(self.costs, choice[..., None], -1).sum())

    def slots_of(self, choice: np.ndarray) -> int:
        return int(self.slots[choice].sum())

    def at_price(self, price: float) -> np.ndarray:
        """The choice of least cost + price x slots."""
        return np.stack([self._layer_at_price(layer, price) for layer in self.costs])

    def _layer_at_price(self, costs: np.ndarray, price: float) -> np.ndarray:
        priced = (costs + price * self.slots)[:, self.subsets]  # [heads, subsets, groups]
        best = priced.min(axis=-1).sum(axis=0).argmin()
        return self.subsets[best][priced[:, best].argmin(axis=-1)]

    def bisect(self, total: int) -> np.ndarray:
        """The choice at the least price at which the slots fit."""
        low, high = 1e-12, 1.0
        while (
            self.slots_of(choice := self.at_price(high * max(self.costs.max(), LEAST_COST))) > total
        ):
            high *= 10
        for _ in range(PRICES):
            middle = (low * high) ** 0.5
            attempt = self.at_price(middle * max(self.costs.max(), LEAST_COST))
            if self.slots_of(attempt) > total:
                low = middle
            else:
                high, choice = middle, attempt
        self.price = high * max(self.costs.max(), LEAST_COST)
        return choice

    def spend_rest(self, choice: np.ndarray, total: int) -> np.ndarray:
        """The choice with layers replaced by dearer ones as long as some replacement fits and
        lowers the cost.
        """
        factors = np.geomspace(1, 1e-4, 24)
        offers = [
            np.unique([self._layer_at_price(layer, self.price * f) for f in factors], axis=0)
            for layer in self.costs
        ]
        choice = choice.copy()
        while True:
            rest = total - self.slots_of(choice)
            best = max(
                (
                    offer
                    for layer in range(len(choice))
                    for offer in self._gains(choice, layer, offers[layer], rest)
                ),
                default=None,
                key=lambda offer: offer[0],
            )
            if best is None:
                return choice
            choice[best[1]] = best[2]

    def _gains(
        self, choice: np.ndarray, layer: int, offers: np.ndarray, rest: int
    ) -> list[tuple[float, int, np.ndarray]]:
        """(cost saved a slot, layer, the layer's new choice) of each offer, and of each single
        head, that fits.
        """
        now = choice[layer]
        singles = np.repeat(now[None], len(now) * len(set(now.tolist())), axis=0)
        for row, (head, option) in enumerate(
            (h, o) for h in range(len(now)) for o in sorted(set(now.tolist()))
        ):
            singles[row, head] = option
        every = np.concatenate([offers, singles])
        heads = np.arange(len(now))
        saved = self.costs[layer][heads, now].sum() - self.costs[layer][heads, every].sum(axis=1)
        more = self.slots[every].sum(axis=1) - self.slots[now].sum()
        fits = (more <= rest) & (saved > 1e-12 * max(self.costs[layer].max(), LEAST_COST))
        return [(saved[i] / max(more[i], 1e-3), layer, every[i]) for i in np.flatnonzero(fits)]
