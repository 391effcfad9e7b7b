"""Heads of one kind side by side: the order into which heads are permuted, and the slice that each
group is.

A cache tensor belongs to one group of one layer, so heads with few slots save memory only if they
are neighbors. Plain integers; whoever holds the weights permutes them (`tensor[head_rows(...)]` in
torch or numpy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssd_export.policy.table import HeadGroup, HeadOption


def group_equal_heads(
    options: Sequence[HeadOption],
) -> tuple[list[tuple[HeadOption, int]], tuple[int, ...]]:
    """The different options of a layer, with their number of heads, and the order that puts equals
    together.

    Windows come before scored sets, small before large; within a group heads keep their order.
    """

    def rank(option: HeadOption) -> tuple[int, ...]:
        rule, image_slots, evict_every = option
        return (
            rule.by_score,
            rule.pinned_columns,
            image_slots,
            evict_every,
            rule.num_sinks,
            rule.num_recent,
            rule.age_quota,
        )

    kinds = sorted(set(options), key=rank)
    order = tuple(head for kind in kinds for head, option in enumerate(options) if option == kind)
    return [(kind, sum(option == kind for option in options)) for kind in kinds], order


def group_slices(groups: Sequence[HeadGroup]) -> tuple[slice, ...]:
    """The permuted KV heads of each group of a layer, as slices."""
    slices, start = [], 0
    for group in groups:
        slices.append(slice(start, start + group.num_heads))
        start += group.num_heads
    return tuple(slices)


def query_slices(groups: Sequence[HeadGroup], query_group_size: int) -> tuple[slice, ...]:
    """The permuted query heads of each group: query_group_size for every KV head."""
    return tuple(
        slice(part.start * query_group_size, part.stop * query_group_size)
        for part in group_slices(groups)
    )


def query_head_order(head_order: Sequence[int], query_group_size: int) -> tuple[int, ...]:
    """The original query head at each place when KV heads take their query heads along."""
    return head_rows(head_order, query_group_size)


def head_rows(head_order: Sequence[int], head_dim: int) -> tuple[int, ...]:
    """Row indices that permute a projection by whole heads: output axis of q, k, v, input axis of
    o.
    """
    return tuple(head * head_dim + row for head in head_order for row in range(head_dim))


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes another: its place for each original head."""
    inverse = [0] * len(order)
    for place, head in enumerate(order):
        inverse[head] = place
    return tuple(inverse)
