"""The rules R1 to R9 once more, in plain Python lists and floats: slow, one head of one row at a
time.

Written from the rules' text, not from the reference; every backend must agree with it slot for
slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssd_export.policy.table import Rule

Vector = list[float]


@dataclass
class Held:
    """The token in a slot."""

    key: Vector
    value: Vector
    position: int
    score: float


class OracleHead:
    """One KV head of one row, with the query heads that share it."""

    def __init__(
        self,
        rule: Rule,
        num_slots: int,
        evict_every: int,
        score_decay: float,
        prompt_length: int,
        grid_width: int,
    ) -> None:
        self.rule, self.num_slots, self.evict_every = rule, num_slots, evict_every
        self.score_decay, self.prompt_length = score_decay, prompt_length
        self.grid_width = grid_width
        self.slots: list[Held | None] = [None] * num_slots
        self.smallest_gap = (
            math.inf
        )  # between a token kept and one evicted: how near a tie a case comes
        self.num_evictions = 0

    @property
    def positions(self) -> list[int]:
        return [-1 if held is None else held.position for held in self.slots]

    @property
    def scores(self) -> list[float]:
        return [0.0 if held is None else held.score for held in self.slots]

    def prefill(
        self, queries: list[list[Vector]], keys: list[Vector], values: list[Vector]
    ) -> list[list[Vector]]:
        """R8. queries [G][T][D], keys and values [T][D], padding ignored. Returns
        [G][prompt_length][D].
        """
        length = self.prompt_length
        for token in range(length):
            self.slots[token] = Held(keys[token], values[token], token, 0.0)
        return [
            [self._attend(query_head[token], self.slots[: token + 1]) for token in range(length)]
            for query_head in queries
        ]

    def step(
        self, queries: list[Vector], key: Vector, value: Vector, position: int
    ) -> list[Vector]:
        """R7. queries [G][D], key and value [D]. Returns [G][D]."""
        if None not in self.slots:
            self._evict(self.evict_every, newest=position)
        self.slots[self.slots.index(None)] = Held(key, value, position, 0.0)
        return [self._attend(query, self.slots) for query in queries]

    def _evict(self, count: int, newest: int) -> None:
        self.num_evictions += 1
        evicted: list[int] = []
        for slots, share in self._strata(count, newest):
            order = sorted(
                slots, key=lambda slot: (self._retention(self.slots[slot], newest), slot)
            )
            evicted += order[:share]
            if 0 < share < len(order):
                best_evicted, least_kept = (
                    self.slots[slot] for slot in order[share - 1 : share + 1]
                )
                gap = self._retention(least_kept, newest) - self._retention(best_evicted, newest)
                self.smallest_gap = min(self.smallest_gap, gap)
        kept = [slot for slot in range(self.num_slots) if slot not in evicted]
        for slot in evicted:
            self.slots[slot] = None
        for slot in kept:
            self.slots[slot].score *= self.score_decay

    def _strata(self, count: int, newest: int) -> list[tuple[list[int], int]]:
        """Slots that compete with each other, and how many of them an eviction of count takes."""
        if not self.rule.age_quota:
            return [(list(range(self.num_slots)), count)]
        free = [
            slot
            for slot in range(self.num_slots)
            if self._retention(self.slots[slot], newest) < math.inf
        ]
        free.sort(key=lambda slot: self.slots[slot].position, reverse=newest % 2 == 1)
        middle, larger_share = math.ceil(len(free) / 2), math.ceil(count / 2)
        return [(free[:middle], larger_share), (free[middle:], count - larger_share)]

    def _retention(self, held: Held, newest: int) -> float:
        rule = self.rule
        num_sinks = self.prompt_length if rule.num_sinks == -1 else rule.num_sinks
        if held.position < num_sinks or held.position > newest - rule.num_recent:
            return math.inf
        if held.position >= self.prompt_length:
            column = (held.position - self.prompt_length) % self.grid_width
            if rule.pinned_columns & 2**column:
                return math.inf
        return held.score if rule.by_score else float(held.position)

    def _attend(self, query: Vector, slots: list[Held | None]) -> Vector:
        tokens = [held for held in slots if held is not None]
        logits = [
            sum(q * k for q, k in zip(query, held.key)) / math.sqrt(len(query)) for held in tokens
        ]
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        total = sum(weights)
        output = [0.0] * len(query)
        for held, weight in zip(tokens, weights):
            held.score += weight / total
            for index, number in enumerate(held.value):
                output[index] += weight / total * number
        return output
