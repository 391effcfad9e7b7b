"""Every policy at every budget on the same captions and random numbers: one cell each, in parts,
resumable.

Demo model: scene score by category and teacher-forced loss above the full cache on true scenes (of
zero captions: the loss alone). Any other model: agreement with the full cache (tokens,
teacher-forced KL, PSNR). Differences are taken case by case. A policy may be a variant
(variants.py), such as h2o@evict-every=24. Parts run on several processes.

    OUT/settings.json                what the cells have in common; a sweep of other settings needs
    another folder OUT/cells/POLICY-bB-seedS.json   the images of a seed, judged; .npz their
    tokens, .png the first of seed 0 OUT/cells/POLICY-bB-loss.json    the teacher-forced loss
                                     (a part of another policy table, of another head map say, is
                                     measured again)
    OUT/sweep.json sweep.md pareto.png sheet.png   written from the cells that are there
    (sweep_report.py)
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ssd_export.demo.language import categories_of, speaks_demo
from ssd_export.demo.scenes import CATEGORIES
from ssd_export.errors import UserError
from ssd_export.files import make_folder, write_file
from ssd_export.machine import num_cpus
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.find import model_folder
from ssd_export.os_errors import os_error
from ssd_export.runtime.runners import find_runner
from ssd_export.runtime.small_models import default_batch
from ssd_export.sweep.cells import CellRunner, policy_hash, policy_table
from ssd_export.sweep.jobs import settle_jobs
from ssd_export.sweep.policy_variant import Variant
from ssd_export.sweep.spec import FULL, Part, SweepSpec, cell_name, check_spec
from ssd_export.typed_json import read_json
from ssd_export.version import TOOL_VERSION
from ssd_export.worker_processes import Outcome, run_parts

SCORE = "scene score"
Progress = Callable[[str, int, int], None]
PER_CASE = ("ok", "psnr", "token_agreement")  # lists of a seed's images
MEANS = ("ms_per_token", "cpu_ms_per_token", "seconds_per_image")
NOT_SHARED = (
    "model",
    "policies",
    "budgets",
    "out",
    "jobs",
    "threads",
    "lookahead",
)  # of a spec: what cells may differ in


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep. cells: what is there of each, in the order of the spec; skipped: why a
    cell cannot be, failed: why a part is missing, both by its name.
    """

    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def settle(spec: SweepSpec) -> SweepSpec:
    """The spec with the numbers that the model and this machine decide. Raises: UserError for a
    wrong spec.
    """
    check_spec(spec)
    checkpoint = open_checkpoint(model_folder(spec.model)[1])
    _check_policies(spec, checkpoint)
    batch = spec.batch or default_batch(checkpoint.config)
    provider = find_runner(spec.runner).provider(spec.provider)
    jobs = settle_jobs(spec.jobs, checkpoint, batch, provider == "cpu")
    return replace(spec, batch=batch, provider=provider, jobs=jobs)


def _check_policies(spec: SweepSpec, checkpoint: Checkpoint) -> None:
    """Raises UserError for a changed policy that is refused at every budget: that is no cell which
    cannot be, but a number that was not meant.
    """
    budgets = [budget for budget in spec.budgets if budget < 1]
    for name in (name for name in spec.policies if Variant.parse(name).changes):
        refused: list[UserError] = []
        for budget in budgets:
            try:
                policy_table(spec, checkpoint, name, budget)
            except UserError as error:
                refused.append(error)
        if budgets and len(refused) == len(budgets):
            raise UserError(f"--policies {name}: {refused[0]}")


def run_sweep(spec: SweepSpec, progress: Progress = lambda stage, done, total: None) -> SweepResult:
    """Runs what is not there yet, and returns all cells. A cell that cannot be (no head map, say)
    is skipped, one that fails is named; the others go on.

    Raises: UserError for a wrong spec, a folder that holds a sweep of other settings, a full cache
    that cannot be.
    """
    spec = settle(spec)
    name, folder = model_folder(spec.model)
    checkpoint = open_checkpoint(folder)
    scored = speaks_demo(checkpoint.config)
    if not spec.num_prompts and not scored:
        raise UserError(f"--num-prompts 0: {name} is compared by what it generates; use 300")
    checkpoint.head_map(spec.head_map)  # a wrong one is refused before the work
    settings = _settings(spec, name, checkpoint)
    make_folder(spec.out / "cells")
    _check_settings(spec, settings)
    parts = spec.parts(scored)
    tables = _Tables(spec, checkpoint)
    todo = [part for part in parts if not tables.is_finished(part)]
    skipped, failed = {}, {}
    told = _Told(progress, todo, spec)

    def ended(part: Part, outcome: Outcome) -> None:
        told(part, 1, 1)
        if outcome.refused and part.policy == FULL:
            raise UserError(outcome.refused)
        if outcome.refused:
            skipped[cell_name(*part.cell)] = outcome.refused
        elif outcome.failed:
            failed[part.file(spec.out).stem] = outcome.failed

    first = (
        [] if scored else [part for part in todo if part.policy == FULL]
    )  # what the others are compared with
    for some in (first, [part for part in todo if part not in first]):
        if some:
            run_parts(some, spec.settled_jobs, partial(CellRunner, spec), told, ended)
    return SweepResult(settings, _cells(spec, parts), skipped, failed)


def finished_part(spec: SweepSpec) -> SweepResult:
    """The result that an interrupted sweep has left."""
    path = spec.out / "settings.json"
    if not path.is_file():
        return SweepResult({}, [])
    settings = _read(path) | {"seeds": spec.seeds}
    return SweepResult(settings, _cells(spec, spec.parts(settings["measure"] == SCORE)))


class _Tables:
    """Checks that finished parts were measured under the tables that they would have now."""

    def __init__(self, spec: SweepSpec, checkpoint: Checkpoint) -> None:
        self._spec = spec
        self._hash = cache(
            lambda policy, budget: policy_hash(policy_table(spec, checkpoint, policy, budget))
        )

    def is_finished(self, part: Part) -> bool:
        """Removes a part of another policy table, which no report may count."""
        path = part.file(self._spec.out)
        if not path.is_file():
            return False
        try:
            same = _read(path).get("policy_hash") == self._hash(*part.cell)
        except UserError:  # damaged; or the cell cannot be any more, and whoever runs it says why
            same = False
        if not same:
            path.unlink()
        return same


class _Told:
    """Progress of the whole sweep as one stage, so that the time left is that of all parts to
    come.
    """

    def __init__(self, progress: Progress, todo: Sequence[Part], spec: SweepSpec) -> None:
        self._progress, self._stage = progress, f"{len({part.cell for part in todo})} cells"
        self._cost = {part: max(1, round(100 * part.cost(spec))) for part in todo}
        self._done = dict.fromkeys(todo, 0)

    def __call__(self, part: Part, done: int, total: int) -> None:
        self._done[part] = self._cost[part] * done // total
        self._progress(self._stage, sum(self._done.values()), sum(self._cost.values()))


def _cells(spec: SweepSpec, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The cells that something is there of, each put together of its parts."""
    cells = []
    for policy, budget in spec.cells():
        there = [
            part
            for part in parts
            if part.cell == (policy, budget) and part.file(spec.out).is_file()
        ]
        if there:
            found = {part.seed: _read(part.file(spec.out)) for part in there}
            cells.append({"policy": policy, "budget": budget} | put_together(found))
    return cells


def put_together(parts: dict[int | None, dict[str, Any]]) -> dict[str, Any]:
    """One cell of its parts by their seeds: the cases of all seeds one after the other, times
    averaged.

    `seeds` says which there are; without any image it is absent.
    """
    cell: dict[str, Any] = {}
    seeds = [seed for seed in parts if seed is not None]
    for facts in parts.values():
        cell |= facts
    for name in (*PER_CASE, *MEANS):
        if name in cell:
            every = [parts[seed][name] for seed in seeds]
            cell[name] = (
                sum(every) / len(every)
                if name in MEANS
                else [value for values in every for value in values]
            )
    return cell | ({"seeds": seeds} if seeds else {})


def _read(path: Path) -> dict[str, Any]:
    """Reads what an earlier run of the sweep left in a file. Raises: UserError where it is
    damaged.
    """
    try:
        return read_json(path, dict[str, Any], "delete it, and run the sweep again")
    except OSError as error:
        raise os_error(error, "read", path) from None


def _settings(spec: SweepSpec, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings that must be equal for cells to be compared."""
    kept = {key: value for key, value in asdict(spec).items() if key not in NOT_SHARED}
    scored, categories = speaks_demo(checkpoint.config), categories_of(checkpoint.config)
    return {
        **kept,
        "model": name,
        "model_fingerprint": checkpoint.fingerprint(),
        "tool_version": TOOL_VERSION,
        "measure": SCORE if scored else "agreement with the full cache",
        **({"lookahead": list(spec.lookahead)} if spec.lookahead else {}),
        **({"categories": list(categories)} if categories != CATEGORIES else {}),
        "machine": f"{platform.machine()}, {num_cpus()} cores, {platform.system()}",
    }


def _check_settings(spec: SweepSpec, settings: dict[str, Any]) -> None:
    path = spec.out / "settings.json"
    if not path.exists():
        write_file(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        return
    there = _read(path)
    different = [
        key for key in settings if key != "seeds" and there.get(key) != settings[key]
    ]  # seeds can be added
    if different:
        key = different[0]
        raise UserError(
            f"{path.parent} holds a sweep with another {key} ({there.get(key)}, now"
            f" {settings[key]}); choose another --out, or delete it"
        )
