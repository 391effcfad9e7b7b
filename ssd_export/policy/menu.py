"""The options among which ssd-auto chooses for every KV head."""

from __future__ import annotations

from dataclasses import replace

from ssd_export.config import Grid
from ssd_export.policy.table import HeadOption, Rule

PARTS = 36  # sizes are given in parts of all image tokens
WINDOW_PARTS = (1, 2, 4, 8, 16)
HALF_RECENT_PARTS = (4, 8, 16)
MOSTLY_RECENT_PARTS = (2, 3, 4, 6, 8, 12, 16, 24)


def window(slots: int) -> HeadOption:
    """The prompt and the newest image tokens: a ring, which wastes nothing by evicting at every
    step.
    """
    return HeadOption(Rule(-1, 0, False), slots, 1)


def scored(slots: int, grid: Grid) -> HeadOption:
    """The prompt, the newest half, and what ranks highest."""
    return _ranked(slots // 2, slots, grid)


def mostly_recent(slots: int, grid: Grid) -> HeadOption:
    """The prompt, the newest three quarters, and what ranks highest."""
    return _ranked(3 * slots // 4, slots, grid)


def _ranked(num_recent: int, slots: int, grid: Grid) -> HeadOption:
    """Evicted once a grid row where R9 allows it, or more often."""
    widths = (grid.width, grid.width // 2, grid.width // 4, 1)
    evict_every = next(count for count in widths if max(num_recent - 1, 0) + count <= slots)
    return HeadOption(Rule(-1, num_recent, True), slots, evict_every)


def menu(grid: Grid) -> tuple[HeadOption, ...]:
    """The options of a model with this grid; the last one keeps everything."""

    def slots(parts: int) -> int:
        return parts * grid.num_tokens // PARTS

    return (
        *(window(slots(parts)) for parts in WINDOW_PARTS),
        *(scored(slots(parts), grid) for parts in HALF_RECENT_PARTS),
        *(mostly_recent(slots(parts), grid) for parts in MOSTLY_RECENT_PARTS),
        window(grid.num_tokens),
    )


def evicts_together(option: HeadOption, lookahead: int, grid: Grid) -> list[HeadOption]:
    """The options nearest to this one whose image slots and evict_every are multiples of
    lookahead, so that all of them are full before the same steps: one of at most as many slots,
    one of at least as many. One that keeps everything is left as it is.

    The recent tokens keep their share of the slots as far as R9 allows.
    """
    if option.image_slots >= grid.num_tokens:
        return [option]
    below = option.image_slots // lookahead * lookahead
    above = -(-option.image_slots // lookahead) * lookahead
    return [
        _evicting_every(option, slots, lookahead)
        for slots in dict.fromkeys((below, above))
        if 2 * lookahead <= slots < grid.num_tokens
    ]


def _evicting_every(option: HeadOption, slots: int, lookahead: int) -> HeadOption:
    """The option over so many slots, with the greatest evict_every up to its own, or lookahead."""
    num_recent = option.rule.num_recent * slots // option.image_slots
    room = slots - max(num_recent - 1, 0)
    evict_every = max(min(room, option.evict_every) // lookahead, 1) * lookahead
    num_recent = min(num_recent, slots - evict_every + 1)
    return HeadOption(replace(option.rule, num_recent=num_recent), slots, evict_every)
