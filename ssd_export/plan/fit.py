"""`plan --fit`: the best settings that a memory size allows, and the other ways where nothing
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssd_export.errors import UserError
from ssd_export.machine import gib
from ssd_export.plan.stages import Plan

WEIGHTS = ("none", "int8", "int4")  # in the order in which they are given up
BUDGETS = (0.2, 0.15, 0.1)
BATCHES = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Settings:
    """Settings that --fit may choose. num_images: images generated at once."""

    weights: str
    budget: float
    num_images: int


def fit(
    plan_of: Callable[[Settings], Plan],
    needed: Callable[[Plan], int],
    memory_bytes: int,
    weights: Sequence[str] = WEIGHTS,
    budgets: Sequence[float] = BUDGETS,
    batches: Sequence[int] = BATCHES,
) -> tuple[Settings, Plan]:
    """The settings that fit, and their plan: precision is given up last but for the batch, the
    budget before it.

    In this order: full precision before int8 before int4; within one precision the largest budget;
    then as many images at once as still fit.
    Args: a sequence of one holds what the user has settled. needed: the bytes of a plan that must
    fit.
    Raises: UserError where nothing fits, with what the smallest settings need.
    """
    for precision in weights:
        for budget in budgets:
            for num_images in batches:
                settings = Settings(precision, budget, num_images)
                plan = plan_of(settings)
                if needed(plan) <= memory_bytes:
                    return settings, plan
    least = needed(plan_of(Settings(weights[-1], budgets[-1], batches[-1])))
    raise UserError(
        f"nothing fits into {gib(memory_bytes)}: the smallest choice (--weights {weights[-1]}"
        f" --budget {budgets[-1]:g} --batch {batches[-1]}) needs {gib(least)}; use a smaller model,"
        " a larger device, or --kv-dtype int8"
    )
