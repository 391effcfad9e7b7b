"""The window of lookahead that build-engine builds for: the one asked for, or the bundle's."""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.plan.lookahead import OFF
from ssd_export.policy.table import MAX_LOOKAHEAD, PolicyTable
from ssd_export.tensorrt.profiles import MOST_WITH_WINDOWS
from ssd_export.tensorrt.step_form import DECODE_WINDOW
from ssd_export.tensorrt.target import Batch

USUAL = 16  # tokens of a pass: of an image on a GPU they still cost little beside the weights


def planned_window(asked: int | None, bundle: Bundle, batch: Batch) -> tuple[int, str]:
    """(tokens of a pass, 0 for no engine of lookahead; why there is none).

    Args: asked: OFF for none, None for an engine where the bundle is made for lookahead.
    Raises: UserError for a window that is asked for and cannot be.
    """
    if asked == OFF:
        return 0, "--lookahead off"
    why_not = _why_not(bundle, batch)
    if asked is not None:
        if why_not:
            raise UserError(f"--lookahead {asked}: {why_not}, or --lookahead off")
        most = min(MAX_LOOKAHEAD, bundle.config.policy.grid.num_tokens)
        if not 2 <= asked <= most:
            raise UserError(f"--lookahead {asked} is outside 2 .. {most}; use {min(USUAL, most)}")
        return asked, ""
    if not why_not and not is_for_lookahead(bundle.config.policy):
        why_not = (
            "heads of this bundle evict before most steps, which ends a pass; export it with"
            f" --lookahead {USUAL}, or build with --lookahead {USUAL} all the same"
        )
    return (0, why_not) if why_not else (USUAL, "")


def is_for_lookahead(table: PolicyTable) -> bool:
    """Whether passes of several tokens are seldom cut short: heads evict together, or never."""
    return table.lookahead is not None or not any(
        group.can_fill(table.prompt_slots, table.grid) for group in table.groups()
    )


def _why_not(bundle: Bundle, batch: Batch) -> str:
    if DECODE_WINDOW not in bundle.config.graphs:
        return "the bundle was exported without the graph that lookahead needs; export it again"
    if batch.min > MOST_WITH_WINDOWS:
        return (
            f"lookahead is for up to {MOST_WITH_WINDOWS} images at once; use --batch 1:{batch.opt}:"
            f"{batch.max}"
        )
    return ""
