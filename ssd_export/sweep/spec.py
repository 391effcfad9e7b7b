"""Specification of a sweep, and where each of its cells is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.policy.table import FULL
from ssd_export.runtime.runners import check_threads
from ssd_export.sampling import as_count, rows_start
from ssd_export.sweep.policy_variant import Variant

MAX_COUNT = 100_000  # of seeds, scenes or processes: what no sweep comes to the end of
SHOWN = 8  # images of a cell that are kept for the contact sheet
GOAL_POLICIES = (
    "ssd-auto",
    "streaming-llm",
    "h2o",
    "ssd-row",
)  # what goals.py compares, and ssd-auto's base
GOAL_BUDGETS = (0.2, 0.1)
SCENE_SEED = (
    1000  # of the true scenes for the teacher-forced loss, so that they are no seed's captions
)


@dataclass(frozen=True)
class SweepSpec:
    """Options of a sweep. policies: variants as they are spelled; num_prompts: captions for each
    seed, 0 generates nothing; seeds: number of seeds, 0 .. seeds - 1; threads: of the CPU, in each
    process; num_scenes: true scenes of the teacher-forced loss; jobs: processes. batch and jobs:
    None until sweep.settle. lookahead: modes to measure beside single steps.
    """

    model: str
    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    num_prompts: int
    seeds: int
    num_scenes: int
    batch: int | None
    runner: str
    provider: str | None
    cfg_scale: float | None
    temperature: float | None
    head_map: str | None
    out: Path
    jobs: int | None = 1
    threads: int | None = None
    lookahead: tuple[int | str, ...] = ()

    @property
    def settled_batch(self) -> int:
        """Images generated at once."""
        assert self.batch is not None
        return self.batch

    @property
    def settled_jobs(self) -> int:
        """Processes side by side."""
        assert self.jobs is not None
        return self.jobs

    def cells(self) -> list[tuple[str, float]]:
        """(policy, budget), the full cache first: it is what all others are compared with, and
        needs no budget.
        """
        others = [name for name in self.policies if name != FULL]
        return [
            (FULL, 1.0),
            *((name, budget) for name in others for budget in self.budgets if budget < 1),
        ]

    def parts(self, scored: bool) -> list[Part]:
        """The parts in an order by which an interrupted sweep says most: the full cache, then the
        cells of the goals, and the first seed and the loss of every cell before any other seed.

        Args: scored: the model's images have a score; else the full cache is compared with nothing.
        """
        cells = sorted(self.cells(), key=_rank)
        parts = []
        for seed in range(max(1, self.seeds if self.num_prompts else 1)):
            for policy, budget in cells:
                if self.num_prompts and Variant.parse(policy).has_bundle:
                    parts.append(Part(policy, budget, seed))
                if seed == 0 and (scored or policy != FULL):
                    parts.append(Part(policy, budget, None))
        return parts


@dataclass(frozen=True)
class Part:
    """A part that a process does at a time: the images of one seed of a cell, or (seed None) its
    teacher-forced loss.
    """

    policy: str
    budget: float
    seed: int | None

    @property
    def cell(self) -> tuple[str, float]:
        """(policy, budget) of the cell that the part belongs to."""
        return self.policy, self.budget

    def file(self, out: Path, suffix: str = ".json") -> Path:
        """The part's file in the folder of a sweep."""
        what = "loss" if self.seed is None else f"seed{self.seed}"
        return out / "cells" / f"{cell_name(*self.cell)}-{what}{suffix}"

    def cost(self, spec: SweepSpec) -> float:
        """Estimated time in images with the full cache; measured on the demo model."""
        if self.seed is None:
            return 0.6 * spec.num_scenes
        return spec.num_prompts * (0.4 + 0.6 * self.budget)


def _rank(cell: tuple[str, float]) -> tuple[int, int, int]:
    policy, budget = cell
    if policy == FULL:
        return 0, 0, 0
    if budget not in GOAL_BUDGETS:
        return 3, 0, 0
    place = GOAL_BUDGETS.index(budget)
    return (1, place, GOAL_POLICIES.index(policy)) if policy in GOAL_POLICIES else (2, place, 0)


def check_spec(spec: SweepSpec) -> SweepSpec:
    """Returns the spec if it can be run. Raises: UserError."""
    for name in spec.policies or ("",):
        Variant.parse(name)
    wrong = [budget for budget in spec.budgets if not 0 < budget <= 1]
    if wrong or not spec.budgets:
        raise UserError(
            f"--budgets: {wrong[0] if wrong else '(none)'} is outside (0, 1]; use 0.1,0.2,0.5"
        )
    if spec.num_prompts < 0:
        raise UserError(
            f"--num-prompts {spec.num_prompts} is below 0; use 300, or 0 for the teacher-forced"
            " loss alone"
        )
    if spec.lookahead and not spec.num_prompts:
        raise UserError("--lookahead generates images; use --num-prompts 300, or leave it out")
    if any(rows_start(mode) for mode in spec.lookahead):
        raise UserError(
            "--lookahead zipar:S needs caches that keep everything, and a sweep compares policies"
            " that evict; use python -m benchmarks.zipar, or modes such as auto,8"
        )
    for name, value in (
        ("seeds", spec.seeds),
        ("batch", spec.batch),
        ("num-scenes", spec.num_scenes),
        ("jobs", spec.jobs),
    ):
        if value is not None:
            as_count(value, f"--{name}", way_out="use 1 or more", most=MAX_COUNT)
    check_threads(spec.threads, "--threads")
    return spec


def cell_name(policy: str, budget: float) -> str:
    """The name of a cell, in files and tables."""
    return re.sub(r"[^\w.@=-]+", "-", f"{policy}-b{budget:g}")
