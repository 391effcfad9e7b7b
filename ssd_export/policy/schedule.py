"""When a policy releases slots, and how many tokens a picture loses by it: known before the first
step from the prompts' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_export.policy.table import PolicyTable


def release_steps(table: PolicyTable, lengths: Sequence[int]) -> frozenset[int]:
    """Steps before which some head that releases several slots at a time has no empty slot (R7)."""
    num_tokens = table.grid.num_tokens
    return frozenset().union(
        *(full_before(kind, lengths, num_tokens) for kind in table.release_kinds)
    )


def full_before(kind: tuple[int, int], lengths: Sequence[int], num_tokens: int) -> frozenset[int]:
    """The steps before which heads of that kind are full, in a row with a prompt of one of these
    lengths.

    A head with num_slots slots and a prompt of length L is full before step num_slots - L + 1, and
    then after every evict_every writes.
    """
    num_slots, evict_every = kind
    firsts = {num_slots - length + 1 for length in lengths}
    return frozenset(step for first in firsts for step in range(first, num_tokens, evict_every))


def tokens_dropped(table: PolicyTable, length: int) -> int:
    """(layer, KV head, token) triples that a row with a prompt of this length drops while a picture
    is drawn.

    All image tokens are written but the last, which is only drawn.
    """
    dropped = 0
    for group in (group for layer in table.layers for group in layer):
        overflow = length + table.grid.num_tokens - 1 - group.num_slots
        if overflow > 0:
            dropped += group.num_heads * -(-overflow // group.evict_every) * group.evict_every
    return dropped
