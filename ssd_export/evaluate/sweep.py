"""Every policy at every budget on the same captions and random numbers: one cell each, resumable.

Demo model: scene score by category and teacher-forced loss above the full cache on true scenes (of zero captions: the
loss alone). Any other model: agreement with the full cache (tokens, teacher-forced KL, PSNR). Differences are taken
case by case. A policy may be a variant (variants.py), such as h2o@evict-every=24.

    OUT/settings.json           what the cells have in common; a sweep of other settings needs another folder
    OUT/cells/POLICY-bB.json    one finished cell; where pictures were drawn, .npz their tokens, .png the first of them
    OUT/sweep.json sweep.md pareto.png sheet.png   written from the cells (sweep_report.py)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssd_export.bundle import TOOL_VERSION
from ssd_export.cache.head_map import HeadMap, find_head_map
from ssd_export.errors import UserError
from ssd_export.evaluate.sweep_cells import CellRunner, Units, draws_scenes
from ssd_export.evaluate.sweep_spec import FULL, SweepSpec, cell_file, cell_name, check_spec
from ssd_export.evaluate.variants import Variant
from ssd_export.export.exporter import model_folder
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.runtime.pictures import make_folder, write_file

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SweepResult:
    """cells: finished ones in the order of the spec; skipped: why a cell cannot be, by its name."""

    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    skipped: dict[str, str]


def run_sweep(spec: SweepSpec, progress: Progress = lambda stage, done, total: None) -> SweepResult:
    """Runs what is not there yet, and returns all cells. A cell that cannot be (no head map, say) is skipped.

    Raises: UserError for a wrong spec, or a folder that holds a sweep of other settings.
    """
    check_spec(spec)
    name, folder = model_folder(spec.model)
    checkpoint = open_checkpoint(folder)
    if not spec.num_prompts and not draws_scenes(checkpoint.config):
        raise UserError(f"--num-prompts 0: {name} is compared by what it draws; use 300")
    head_map = find_head_map(checkpoint.config, spec.head_map, checkpoint.fingerprint(), folder)
    settings = _settings(spec, name, checkpoint, head_map)
    make_folder(spec.out / "cells")
    _check_settings(spec.out / "settings.json", settings)
    runner = CellRunner(spec, checkpoint)
    done, skipped = {}, {}
    todo = [cell for cell in spec.cells() if not cell_file(spec.out, *cell).is_file()]
    units = Units(progress, len(todo), spec)
    for policy, budget in todo:
        variant = Variant.parse(policy)
        choice = variant.choice(spec.model, budget, spec.head_map)
        try:
            table = variant.table(choice, checkpoint, folder)
        except UserError as error:
            if policy == FULL:
                raise
            skipped[cell_name(policy, budget)] = str(error)
        else:
            runner.run(variant, choice, table, units)
        units.cell_done()
    for policy, budget in spec.cells():
        if cell_file(spec.out, policy, budget).is_file():
            done[policy, budget] = json.loads(cell_file(spec.out, policy, budget).read_text())
    return SweepResult(settings, list(done.values()), skipped)


def _settings(spec: SweepSpec, name: str, checkpoint: Checkpoint, head_map: HeadMap | None) -> dict[str, Any]:
    """What must be equal for cells to be compared."""
    kept = {key: value for key, value in asdict(spec).items() if key not in ("model", "policies", "budgets", "out")}
    scored = draws_scenes(checkpoint.config)
    return {
        **kept, "model": name, "model_fingerprint": checkpoint.fingerprint(), "tool_version": TOOL_VERSION,
        "head_map_hash": "" if head_map is None else hashlib.sha256(json.dumps(head_map.to_dict()).encode()).hexdigest(),
        "measure": "scene score" if scored else "agreement with the full cache",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }  # fmt: skip


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_file(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    different = [key for key in settings if there.get(key) != settings[key]]
    if different:
        key = different[0]
        raise UserError(f"{path.parent} holds a sweep with another {key} ({there.get(key)}, now {settings[key]}); "
                        "choose another --out, or delete it")  # fmt: skip
