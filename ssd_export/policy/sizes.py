"""Slots and buffers that a budget pays for: what shrinks where it is small, and what it is too
small for.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

from ssd_export.config import Grid
from ssd_export.errors import UserError


def window_and_ranked_slots(
    budget: float,
    asked: int | None,
    num_spatial: int,
    num_semantic: int,
    least: int,
    grid: Grid,
    lookahead: int,
    notes: list[str],
) -> tuple[int, int]:
    """Image slots of a spatial and of a semantic head that use up the budget over all heads, both
    multiples of lookahead.

    A window that was asked for is kept. Otherwise it is default_window, or less where the mean is
    small (0.7 of it: a window larger than a scored set serves neither kind), or more where semantic
    heads hold everything already; never too small for the token above.
    """
    usual, num_tokens = default_window(grid), grid.num_tokens
    # It holds the token one grid row above while it writes the first after an eviction.
    smallest = _up(grid.width + lookahead, lookahead)
    if asked is not None and asked < smallest:
        raise UserError(
            f"window={asked} does not hold the token one grid row above; use window >= {smallest}"
        )
    heads = num_spatial + num_semantic
    total = floor(Fraction(str(budget)) * num_tokens * heads)
    affordable = (total - num_semantic * least) // max(num_spatial, 1)
    window = min(
        asked or max(smallest, _down(min(usual, 7 * total // (10 * heads), affordable), lookahead)),
        num_tokens,
    )
    least = _up(least, lookahead)
    if num_spatial * window + num_semantic * least > total:
        enough = (num_spatial * window + num_semantic * least) / (heads * num_tokens)
        raise budget_too_small(
            budget,
            f"is too small for window={window} on {num_spatial} of {heads} heads and at least"
            f" {least} image slots on the others",
            enough,
            " or a smaller window" if window > smallest and num_spatial else "",
        )
    slots = 0
    if num_semantic:
        slots = _down((total - num_spatial * window) // num_semantic, lookahead, num_tokens)
    if asked is None and num_spatial and slots in (0, num_tokens):
        window = _down((total - num_semantic * slots) // num_spatial, lookahead, num_tokens)
    if asked is None and num_spatial and window < usual:
        notes.append(
            f"window {window} instead of {usual}: the budget is {total // heads} slots a head"
        )
    return window, slots


def _down(slots: int, lookahead: int, num_tokens: int | None = None) -> int:
    """The greatest multiple of lookahead that is no more; num_tokens where they are all held."""
    if num_tokens is not None and slots >= num_tokens:
        return num_tokens
    return slots // lookahead * lookahead


def _up(slots: int, lookahead: int) -> int:
    return -(-slots // lookahead) * lookahead


def slots_for_lookahead(slots: int, lookahead: int, budget: float, grid: Grid) -> int:
    """The slots of a head that evicts a multiple of lookahead at a time and keeps as many."""
    if slots < 2 * lookahead:
        raise budget_too_small(
            budget,
            f"leaves {slots} image slots a head, too few to keep {lookahead} and evict {lookahead}",
            2 * lookahead / grid.num_tokens,
            " or a smaller lookahead",
        )
    return _down(slots, lookahead)


def default_window(grid: Grid) -> int:
    """Image slots of a spatial head where nothing else is asked: two grid rows and two thirds."""
    return 8 * grid.width // 3


def grid_row_buffer(slots: int, width: int, notes: list[str]) -> int:
    """A grid row of slots to fill between two evictions, or a divisor of it that leaves at least as
    many tokens kept.
    """
    most = max(slots // 2, 1)
    size = max(count for count in range(1, width + 1) if width % count == 0 and count <= most)
    if size < width:
        notes.append(
            f"evict_every {size} instead of {width}: {slots} image slots would be mostly buffer"
        )
    return size


def recent_guard(wanted: int, slots: int, evict_every: int, notes: list[str]) -> int:
    """num_recent as wanted, but at least a quarter of what an eviction keeps stays free to rank."""
    num_recent = min(wanted, max(slots - evict_every, 0) * 3 // 4 + 1)
    if num_recent < wanted:
        notes.append(
            f"num_recent {num_recent} instead of {wanted}: {slots} image slots hold no more"
        )
    return num_recent


def budget_too_small(budget: float, why: str, enough: float, more: str = "") -> UserError:
    """The error of a budget; enough: one that would do, which is rounded up to four digits."""
    return UserError(f"budget={budget} {why}; use budget >= {ceil(enough * 10_000) / 10_000}{more}")
