"""Schedule of a policy's evictions, and how many tokens an image loses by them: known before the
first step from the prompts' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ssd_export.policy.table import HeadGroup, PolicyTable


class EvictionKind(NamedTuple):
    """Groups that agree in both numbers evict before the same steps."""

    num_slots: int
    evict_every: int

    @property
    def graph(self) -> str:
        """The name of the graph that evicts in the groups of this kind alone."""
        return f"evict_{self.num_slots}_slots_{self.evict_every}_at_once"


def eviction_kind(table: PolicyTable, group: HeadGroup) -> EvictionKind | None:
    """The kind of a group that evicts several tokens at a time, and so between steps; None where
    it evicts one token, within a step, or none (R7).
    """
    evicts_between_steps = group.evict_every > 1 and group.num_slots < table.full_slots
    return EvictionKind(group.num_slots, group.evict_every) if evicts_between_steps else None


def eviction_kinds(table: PolicyTable) -> list[EvictionKind]:
    """The kinds of the groups that evict between steps, each once."""
    kinds = {eviction_kind(table, group) for group in table.groups()}
    return sorted(kind for kind in kinds if kind is not None)


def eviction_steps(table: PolicyTable, lengths: Sequence[int]) -> frozenset[int]:
    """Steps before which some head that evicts several tokens at a time has no empty slot (R7)."""
    return frozenset().union(*(full_before(table, kind, lengths) for kind in eviction_kinds(table)))


def full_before(table: PolicyTable, kind: EvictionKind, lengths: Sequence[int]) -> frozenset[int]:
    """The steps before which heads of that kind are full, in a row with a prompt of one of these
    lengths.

    A head with num_slots slots and a prompt of length L is full before step num_slots - L + 1, and
    then after every evict_every writes.
    """
    firsts = {kind.num_slots - length + 1 for length in lengths}
    return frozenset(
        step for first in firsts for step in range(first, table.grid.num_tokens, kind.evict_every)
    )


def rooms(table: PolicyTable, lengths: Sequence[int]) -> list[int]:
    """Steps that the caches take from each step of an image on before the next eviction, without
    one that is due before that very step.

    Args: lengths: of the prompts in the rows of the image.
    """
    num_tokens = table.grid.num_tokens
    kinds = {
        EvictionKind(group.num_slots, group.evict_every)
        for group in table.groups()
        if group.can_fill(table.prompt_slots, table.grid)
    }
    full = frozenset().union(*(full_before(table, kind, lengths) for kind in kinds))
    room, found = 0, []
    for step in reversed(range(num_tokens)):
        room += 1
        found.append(room)
        room = 0 if step in full else room
    return found[::-1]


def tokens_evicted(table: PolicyTable, length: int) -> int:
    """(layer, KV head, token) triples that a row with a prompt of this length drops while an image
    is generated.

    All image tokens are written but the last, which no later step reads.
    """
    evicted = 0
    for group in table.groups():
        overflow = length + table.grid.num_tokens - 1 - group.num_slots
        if overflow > 0:
            evicted += group.num_heads * -(-overflow // group.evict_every) * group.evict_every
    return evicted
