"""The options among which ssd-auto chooses for every KV head."""

from __future__ import annotations

from ssd_export.config import GRID, NUM_IMAGE_TOKENS
from ssd_export.policy.table import HeadOption, Rule

WINDOW_SLOTS = (16, 32, 64, 128, 256)
HALF_RECENT_SLOTS = (64, 128, 256)
MOSTLY_RECENT_SLOTS = (32, 48, 64, 96, 128, 192, 256, 384)


def window(slots: int) -> HeadOption:
    """The prompt and the newest image tokens: a ring, which wastes nothing by releasing at every
    step.
    """
    return HeadOption(Rule(-1, 0, False), slots, 1)


def scored(slots: int) -> HeadOption:
    """The prompt, the newest half, and what ranks highest; released once a grid row."""
    return HeadOption(Rule(-1, slots // 2, True), slots, GRID)


def mostly_recent(slots: int) -> HeadOption:
    """The newest three quarters and what ranks highest; released once a grid row where R9 allows
    it, or more often.
    """
    num_recent = 3 * slots // 4
    evict_every = next(
        count for count in (GRID, GRID // 2, GRID // 4) if num_recent - 1 + count <= slots
    )
    return HeadOption(Rule(-1, num_recent, True), slots, evict_every)


MENU = (
    *map(window, WINDOW_SLOTS),
    *map(scored, HALF_RECENT_SLOTS),
    *map(mostly_recent, MOSTLY_RECENT_SLOTS),
    window(NUM_IMAGE_TOKENS),
)
