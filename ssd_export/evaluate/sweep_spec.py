"""What a sweep compares, and where each of its cells is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.evaluate.variants import Variant

FULL = "full"
SHOWN = 8  # pictures of a cell that are kept for the contact sheet
SCENE_SEED = 1000  # of the true scenes for the teacher-forced loss, so that they are no seed's captions


@dataclass(frozen=True)
class SweepSpec:
    """What is compared. policies: variants as they are spelled; num_prompts: captions for each seed, 0 draws nothing;
    seeds: number of seeds, 0 .. seeds - 1; num_scenes: true scenes of the teacher-forced loss."""

    model: str
    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    num_prompts: int
    seeds: int
    num_scenes: int
    batch: int
    runner: str
    provider: str
    cfg_scale: float | None
    temperature: float | None
    head_map: str | None
    out: Path

    def cells(self) -> list[tuple[str, float]]:
        """(policy, budget), the full cache first: it is what all others are compared with, and needs no budget."""
        others = [name for name in self.policies if name != FULL]
        return [(FULL, 1.0), *((name, budget) for name in others for budget in self.budgets if budget < 1)]


def check_spec(spec: SweepSpec) -> SweepSpec:
    """This spec, if it can be run. Raises: UserError."""
    for name in spec.policies or ("",):
        Variant.parse(name)
    wrong = [budget for budget in spec.budgets if not 0 < budget <= 1]
    if wrong or not spec.budgets:
        raise UserError(f"--budgets: {wrong[0] if wrong else '(none)'} is outside (0, 1]; use 0.1,0.2,0.5")
    if spec.num_prompts < 0:
        raise UserError(f"--num-prompts {spec.num_prompts} is below 0; use 300, or 0 for the teacher-forced loss alone")
    for name, value in (("seeds", spec.seeds), ("batch", spec.batch), ("num-scenes", spec.num_scenes)):
        if value < 1:
            raise UserError(f"--{name} {value} compares nothing; use 1 or more")
    return spec


def cell_name(policy: str, budget: float) -> str:
    return re.sub(r"[^\w.@=-]+", "-", f"{policy}-b{budget:g}")


def cell_file(out: Path, policy: str, budget: float, suffix: str = ".json") -> Path:
    return out / "cells" / f"{cell_name(policy, budget)}{suffix}"
