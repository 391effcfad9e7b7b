"""One cell of a sweep: a policy at a budget draws, is judged, and is asked for its teacher-forced loss."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.cache.table import PolicyTable
from ssd_export.config import GRID, ModelConfig
from ssd_export.demo import codes
from ssd_export.demo.scenes import SIZE
from ssd_export.evaluate.agreement import kl_to_full_cache, psnr, token_agreement
from ssd_export.evaluate.exported import PolicyChoice, temporary_bundle
from ssd_export.evaluate.scene_score import DrawOptions, draw, draw_scenes, judge_picture, share_by_category
from ssd_export.evaluate.sweep_spec import FULL, SCENE_SEED, SHOWN, SweepSpec, cell_file
from ssd_export.evaluate.teacher_forced import SceneLosses, TeacherForced
from ssd_export.evaluate.variants import Variant
from ssd_export.export.exporter import generation_defaults
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.pictures import write_file, write_png

Progress = Callable[[str, int, int], None]


def draws_scenes(config: ModelConfig) -> bool:
    """Whether a model speaks the demo model's image vocabulary, so that its pictures have a score."""
    return config.codebook_size == codes.num_codes() and config.image_size == SIZE


class Units:
    """Progress of the whole sweep as one stage, so that the time left is that of all cells to come."""

    def __init__(self, progress: Progress, num_cells: int, spec: SweepSpec) -> None:
        self._progress, self._num_cells = progress, max(1, num_cells)
        self._per_cell = max(1, spec.seeds * GRID * ceil(spec.num_prompts / spec.batch))
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
        self._scene_losses: SceneLosses | None = None

    def run(self, variant: Variant, choice: PolicyChoice, table: PolicyTable, units: Units) -> None:
        """Draws, measures and writes one cell; its JSON last, so that a cell is finished or absent."""
        budget = choice.budget
        cell = {"policy": variant.name, "budget": budget, "image_slots_mean": table.image_slots_mean,
                "notes": list(table.notes), "prompt_slots": table.prompt_slots}  # fmt: skip
        place = {suffix: cell_file(self.spec.out, variant.name, budget, suffix) for suffix in (".npz", ".png", ".json")}
        seeds = []
        if self.spec.num_prompts and variant.has_bundle:
            with temporary_bundle(choice) as path, ImageGenerator.from_bundle(path, self.spec.runner, self.spec.provider) as generator:
                seeds = [self._draw_seed(generator, seed, variant.name, units) for seed in range(self.spec.seeds)]
                cell |= _cache_facts(generator) | self._pooled(seeds)
        cell |= self._teacher_forced(variant.name, table)
        if seeds:
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
        with np.load(cell_file(self.spec.out, FULL, 1.0, ".npz")) as arrays:
            return [arrays[name] for name in arrays.files]

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

    def _teacher_forced(self, policy: str, table: PolicyTable) -> dict[str, Any]:
        self._model = self._model or TeacherForced(self.checkpoint)
        if self.scored:
            self._scene_losses = self._scene_losses or SceneLosses(self._model, draw_scenes(self.spec.num_scenes, SCENE_SEED))
            losses, kl = self._scene_losses.of(table)
            return {"losses": losses.tolist(), "kl": kl.tolist()}
        if policy == FULL:
            return {}
        count = min(self.spec.num_scenes, self.spec.num_prompts)
        captions = [scene.caption for scene in draw_scenes(self.spec.num_prompts, 0)[:count]]
        sequences = self._model.sequences(captions, self._full_tokens()[0][:count], table.prompt_slots, unconditional=True)
        own = generation_defaults(self.checkpoint.path)["cfg_scale"]
        cfg_scale = own if self.spec.cfg_scale is None else self.spec.cfg_scale
        return {"kl": kl_to_full_cache(self._model, sequences, table, cfg_scale).tolist()}


def _cache_facts(generator: ImageGenerator) -> dict[str, Any]:
    """What the compression did, as allocated and counted."""
    cache = generator.cache
    assert cache is not None
    return {
        "cache_bytes_per_image": cache.bytes_per_image, "image_share_of_full_cache": cache.image_share,
        "tokens_dropped_per_image": cache.tokens_dropped,
    }  # fmt: skip


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for index, image in enumerate(images):
        strip.paste(image, (index * image.width, 0))
    return strip


def pictures_of(strip: Image.Image) -> Iterator[Image.Image]:
    """The square pictures that side_by_side put together."""
    for left in range(0, strip.width, strip.height):
        yield strip.crop((left, 0, left + strip.height, strip.height))
