"""Every policy at every budget on the same captions and random numbers: one cell each, resumable.

Demo model: scene score by category and teacher-forced loss above the full cache on true scenes. Any other model:
agreement with the full cache (tokens, teacher-forced KL, PSNR). Differences are taken case by case.

    OUT/settings.json           what the cells have in common; a sweep of other settings needs another folder
    OUT/cells/POLICY-bB.json    one finished cell; .npz its tokens, .png its first pictures side by side
    OUT/sweep.json sweep.md pareto.png sheet.png   written from the cells (sweep_report.py)
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.bundle import TOOL_VERSION
from ssd_export.cache.policy import POLICIES
from ssd_export.cache.table import PolicyTable
from ssd_export.config import GRID, ModelConfig
from ssd_export.demo import codes
from ssd_export.demo.scenes import SIZE
from ssd_export.errors import UserError
from ssd_export.evaluate.agreement import kl_to_full_cache, psnr, token_agreement
from ssd_export.evaluate.exported import PolicyChoice, temporary_bundle
from ssd_export.evaluate.scene_score import DrawOptions, draw, draw_scenes, judge_picture, share_by_category
from ssd_export.evaluate.teacher_forced import TeacherForced, scene_losses
from ssd_export.export.exporter import model_folder, settle_policy
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.pictures import make_folder, write_file, write_png

FULL = "full"
SHOWN = 8  # pictures of a cell that are kept for the contact sheet
SCENE_SEED = 1000  # of the true scenes for the teacher-forced loss, so that they are no seed's captions
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SweepSpec:
    """What is compared. seeds: number of seeds, 0 .. seeds - 1; num_scenes: true scenes of the teacher-forced loss."""

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


@dataclass(frozen=True)
class SweepResult:
    """cells: finished ones in the order of the spec; skipped: why a cell cannot be, by its name."""

    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    skipped: dict[str, str]


def check_spec(spec: SweepSpec) -> SweepSpec:
    """This spec, if it can be run. Raises: UserError."""
    unknown = [name for name in spec.policies if name not in POLICIES]
    if unknown or not spec.policies:
        raise UserError(f"--policies: unknown policy {', '.join(unknown) or '(none)'}; choose from {', '.join(POLICIES)}")
    wrong = [budget for budget in spec.budgets if not 0 < budget <= 1]
    if wrong or not spec.budgets:
        raise UserError(f"--budgets: {wrong[0] if wrong else '(none)'} is outside (0, 1]; use 0.1,0.2,0.5")
    for name, value in (("num-prompts", spec.num_prompts), ("seeds", spec.seeds), ("batch", spec.batch), ("num-scenes", spec.num_scenes)):
        if value < 1:
            raise UserError(f"--{name} {value} compares nothing; use 1 or more")
    return spec


def draws_scenes(config: ModelConfig) -> bool:
    """Whether a model speaks the demo model's image vocabulary, so that its pictures have a score."""
    return config.codebook_size == codes.num_codes() and config.image_size == SIZE


def run_sweep(spec: SweepSpec, progress: Progress = lambda stage, done, total: None) -> SweepResult:
    """Runs what is not there yet, and returns all cells. A cell that cannot be (no head map, say) is skipped.

    Raises: UserError for a wrong spec, or a folder that holds a sweep of other settings.
    """
    check_spec(spec)
    name, folder = model_folder(spec.model)
    checkpoint = open_checkpoint(folder)
    make_folder(spec.out / "cells")
    settings = _settings(spec, name, checkpoint)
    _check_settings(spec.out / "settings.json", settings)
    runner = CellRunner(spec, checkpoint)
    done, skipped = {}, {}
    todo = [cell for cell in spec.cells() if not _cell_file(spec.out, *cell).is_file()]
    units = Units(progress, len(todo), spec)
    for policy, budget in todo:
        table = _table(spec, policy, budget, checkpoint, folder)
        if isinstance(table, str):
            skipped[cell_name(policy, budget)] = table
        else:
            runner.run(policy, budget, table, units)
        units.cell_done()
    for policy, budget in spec.cells():
        if _cell_file(spec.out, policy, budget).is_file():
            done[policy, budget] = json.loads(_cell_file(spec.out, policy, budget).read_text())
    return SweepResult(settings, list(done.values()), skipped)


def cell_name(policy: str, budget: float) -> str:
    return f"{policy}-b{budget:g}"


def _cell_file(out: Path, policy: str, budget: float, suffix: str = ".json") -> Path:
    return out / "cells" / f"{cell_name(policy, budget)}{suffix}"


def _settings(spec: SweepSpec, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be equal for cells to be compared."""
    kept = {key: value for key, value in asdict(spec).items() if key not in ("model", "policies", "budgets", "out")}
    scored = draws_scenes(checkpoint.config)
    return {
        **kept, "model": name, "model_fingerprint": checkpoint.fingerprint(), "tool_version": TOOL_VERSION,
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


def _table(spec: SweepSpec, policy: str, budget: float, checkpoint: Checkpoint, folder: Path) -> PolicyTable | str:
    """The policy table of a cell, or why there is none."""
    choice = PolicyChoice(spec.model, policy, budget, spec.head_map)
    try:
        return settle_policy(choice.export_spec(), checkpoint, folder)[0]
    except UserError as error:
        if policy == FULL:
            raise
        return str(error)


class Units:
    """Progress of the whole sweep as one stage, so that the time left is that of all cells to come."""

    def __init__(self, progress: Progress, num_cells: int, spec: SweepSpec) -> None:
        self._progress, self._num_cells = progress, max(1, num_cells)
        self._per_cell = spec.seeds * GRID * ceil(spec.num_prompts / spec.batch)
        self._cells, self._within = 0, 0

    def add_row(self, *_: object) -> None:
        """A grid row of a batch is drawn."""
        self._within = min(self._within + 1, self._per_cell - 1)  # the last one is the teacher-forced part
        self._say()

    def cell_done(self) -> None:
        self._cells, self._within = self._cells + 1, 0
        self._say()

    def _say(self) -> None:
        stage = f"{self._num_cells} cells"
        self._progress(stage, self._cells * self._per_cell + self._within, self._num_cells * self._per_cell)


class CellRunner:
    """Runs cells; what they share (torch weights, scenes, the full cache's tokens) is loaded once."""

    def __init__(self, spec: SweepSpec, checkpoint: Checkpoint) -> None:
        self.spec, self.checkpoint = spec, checkpoint
        self.scored = draws_scenes(checkpoint.config)
        self._model: TeacherForced | None = None

    def run(self, policy: str, budget: float, table: PolicyTable, units: Units) -> None:
        """Draws, measures and writes one cell; its JSON last, so that a cell is finished or absent."""
        choice = PolicyChoice(self.spec.model, policy, budget, self.spec.head_map)
        with temporary_bundle(choice) as path:
            with ImageGenerator.from_bundle(path, self.spec.runner, self.spec.provider) as generator:
                seeds = [self._draw_seed(generator, seed, policy, units) for seed in range(self.spec.seeds)]
                cell = self._facts(policy, budget, table, generator) | self._pooled(seeds)
        cell |= self._teacher_forced(policy, table, generator, seeds)
        place = {suffix: _cell_file(self.spec.out, policy, budget, suffix) for suffix in (".npz", ".png", ".json")}
        write_file(place[".npz"], lambda file: np.savez_compressed(file, *[seed["tokens"] for seed in seeds]))
        write_png(place[".png"], side_by_side(seeds[0]["images"][:SHOWN]), {})
        write_file(place[".json"], lambda file: file.write(json.dumps(cell, indent=1).encode()))

    def _draw_seed(self, generator: ImageGenerator, seed: int, policy: str, units: Units) -> dict[str, Any]:
        options = DrawOptions(seed, self.spec.batch, self.spec.cfg_scale, self.spec.temperature)
        scenes = draw_scenes(self.spec.num_prompts, seed)
        drawn = draw(generator, [scene.caption for scene in scenes], options, units.add_row)
        facts = {"tokens": drawn.tokens, "images": drawn.images, "scenes": scenes, "seconds": drawn.seconds,
                 "ms_per_token": drawn.ms_per_token}  # fmt: skip
        if self.scored:
            return facts | {"verdicts": [judge_picture(i, s.caption) for i, s in zip(drawn.images, scenes, strict=True)]}
        if policy == FULL:
            return facts
        reference = self._full_tokens()[seed]
        pairs = zip(drawn.images, reference, strict=True)
        likeness = [psnr(np.asarray(image), generator.runner.decode_image(tokens[None])[0]) for image, tokens in pairs]
        return facts | {"psnr": likeness, "token_agreement": token_agreement(drawn.tokens, reference).tolist()}

    def _full_tokens(self) -> list[np.ndarray]:
        with np.load(_cell_file(self.spec.out, FULL, 1.0, ".npz")) as arrays:
            return [arrays[name] for name in arrays.files]

    def _facts(self, policy: str, budget: float, table: PolicyTable, generator: ImageGenerator) -> dict[str, Any]:
        cache = generator.cache
        assert cache is not None
        return {
            "policy": policy, "budget": budget, "image_slots_mean": table.image_slots_mean, "notes": list(table.notes),
            "prompt_slots": table.prompt_slots, "cache_bytes_per_image": cache.bytes_per_image,
            "image_share_of_full_cache": cache.image_share, "tokens_dropped_per_image": cache.tokens_dropped,
        }  # fmt: skip

    def _pooled(self, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What was drawn and judged, over all seeds."""
        facts: dict[str, Any] = {
            "ms_per_token": statistics.median(seed["ms_per_token"] for seed in seeds),
            "seconds_per_image": sum(seed["seconds"] for seed in seeds) / sum(len(seed["images"]) for seed in seeds),
        }
        if self.scored:
            verdicts = [verdict for seed in seeds for verdict in seed["verdicts"]]
            scenes = [scene for seed in seeds for scene in seed["scenes"]]
            shares = share_by_category(scenes, verdicts)
            facts["categories"] = {name: share.to_dict() for name, share in shares.items()}
            facts["ok"] = [int(verdict.ok) for verdict in verdicts]
        for name in ("psnr", "token_agreement"):
            if name in seeds[0]:
                facts[name] = [value for seed in seeds for value in seed[name]]
        return facts

    def _teacher_forced(
        self, policy: str, table: PolicyTable, generator: ImageGenerator, seeds: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        self._model = self._model or TeacherForced(self.checkpoint)
        if self.scored:
            scenes = draw_scenes(self.spec.num_scenes, SCENE_SEED)
            return {"losses": scene_losses(self._model, scenes, table, table.prompt_slots).tolist()}
        if policy == FULL:
            return {}
        count = min(self.spec.num_scenes, self.spec.num_prompts)
        captions = [scene.caption for scene in seeds[0]["scenes"][:count]]
        sequences = self._model.sequences(captions, self._full_tokens()[0][:count], table.prompt_slots, unconditional=True)
        default = generator.bundle.config["generation"]["cfg_scale"]
        cfg_scale = default if self.spec.cfg_scale is None else self.spec.cfg_scale
        return {"kl": kl_to_full_cache(self._model, sequences, table, cfg_scale).tolist()}


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for index, image in enumerate(images):
        strip.paste(image, (index * image.width, 0))
    return strip


def pictures_of(strip: Image.Image) -> Iterator[Image.Image]:
    """The square pictures that side_by_side put together."""
    for left in range(0, strip.width, strip.height):
        yield strip.crop((left, 0, left + strip.height, strip.height))
