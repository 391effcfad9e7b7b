"""The parts of a sweep's cells: a policy at a budget generates the images of a seed, or is asked
for its teacher-forced loss.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssd_export.demo.language import categories_of, speaks_demo
from ssd_export.demo.scenes import Scene
from ssd_export.errors import UserError
from ssd_export.export.exporter import generation_defaults
from ssd_export.export.temporary_bundle import temporary_bundle
from ssd_export.files import open_regular, write_file
from ssd_export.metrics.scene_score import (
    Generated,
    GenerateOptions,
    draw_scenes,
    generate,
    judge_image,
)
from ssd_export.metrics.similarity import kl_to_full_cache, psnr, token_agreement
from ssd_export.metrics.teacher_forced import SceneLosses, TeacherForced
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.families import family_of
from ssd_export.model.find import model_folder
from ssd_export.model.prompt import Prompt, text_of
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.images import write_png
from ssd_export.sweep.lookahead_modes import lookahead_figures
from ssd_export.sweep.policy_variant import Variant
from ssd_export.sweep.spec import FULL, SCENE_SEED, SHOWN, Part, SweepSpec

Tell = Callable[[int, int], None]
MAX_STRIP_PIXELS = 64 << 20  # of a strip of SHOWN images; those of the largest models take 4 << 20
WAY_OUT = "delete it, and run the sweep again"


# Pillow's: OSError for what it cannot identify, SyntaxError for a broken chunk, its own for a bomb.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def policy_table(
    spec: SweepSpec, checkpoint: Checkpoint, policy: str, budget: float
) -> PolicyTable:
    """The policy table of a cell. Raises: UserError where there is none: no head map, a budget too
    small.
    """
    variant = Variant.parse(policy)
    return variant.table(variant.choice(spec.model, budget, spec.head_map), checkpoint)


def policy_hash(table: PolicyTable) -> str:
    """sha256 of a table: a measurement under another one, from another head map say, is not its
    result.
    """
    return hashlib.sha256(json.dumps(table.to_dict()).encode()).hexdigest()


class CellRunner:
    """Runs parts; what they share (torch weights, true scenes under the full cache, policy tables)
    is made once.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._table = cache(
            lambda policy, budget: policy_table(spec, self._checkpoint, policy, budget)
        )

    def __call__(self, part: Part, tell: Tell) -> None:
        """Measures and writes a part; its JSON last, so that it is finished or absent.

        Raises: UserError for a cell that cannot be: no head map, a budget too small.
        """
        table = self._table(part.policy, part.budget)
        facts = {
            "policy_hash": policy_hash(table),
            "image_slots_mean": table.image_slots_mean,
            "notes": list(table.notes),
            "prompt_slots": table.prompt_slots,
        }
        facts |= (
            self._teacher_forced(part.policy, table)
            if part.seed is None
            else self._generated(part, part.seed, tell)
        )
        write_file(
            part.file(self.spec.out), lambda file: file.write(json.dumps(facts, indent=1).encode())
        )

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(model_folder(self.spec.model)[1])

    @cached_property
    def _scored(self) -> bool:
        return speaks_demo(self._checkpoint.config)

    @cached_property
    def _model(self) -> TeacherForced:
        return TeacherForced(self._checkpoint)

    @cached_property
    def _scene_losses(self) -> SceneLosses:
        return SceneLosses(self._model, self._scenes(self.spec.num_scenes, SCENE_SEED))

    def _scenes(self, count: int, seed: int) -> list[Scene]:
        categories = categories_of(self._checkpoint.config)
        return draw_scenes(count, seed, categories=categories)

    def _prompts(self, count: int, seed: int) -> Sequence[Prompt]:
        """Captions of scenes; of a model that reads none, what its family gives as examples."""
        config = self._checkpoint.config
        if self._scored or family_of(config).reads_text(config):
            return [scene.caption for scene in self._scenes(count, seed)]
        return family_of(config).example_prompts(config, count)

    def _generated(self, part: Part, seed: int, tell: Tell) -> dict[str, Any]:
        spec = self.spec
        choice = Variant.parse(part.policy).choice(spec.model, part.budget, spec.head_map)
        options = GenerateOptions(seed, spec.settled_batch, spec.cfg_scale, spec.temperature)
        captions = self._prompts(spec.num_prompts, seed)
        num_threads = spec.threads or (1 if spec.settled_jobs > 1 else None)
        with (
            temporary_bundle(choice) as path,
            ImageGenerator.from_bundle(path, spec.runner, spec.provider, num_threads) as generator,
        ):
            generated = generate(
                generator, captions, options, lambda _, done, total: tell(done, total)
            )
            facts = _costs(generated, spec.settled_jobs) | self._judged(
                generator, generated, captions, part
            )
            if seed == 0 and spec.lookahead:
                facts["lookahead"] = lookahead_figures(generator, captions, options, spec.lookahead)
        write_file(
            part.file(spec.out, ".npz"), lambda file: np.savez_compressed(file, generated.tokens)
        )
        if seed == 0:
            write_png(part.file(spec.out, ".png"), side_by_side(generated.images[:SHOWN]), {})
        return facts

    def _judged(
        self,
        generator: ImageGenerator,
        generated: Generated,
        captions: Sequence[Prompt],
        part: Part,
    ) -> dict[str, Any]:
        """The score, or what the full cache generated with the same random numbers beside it."""
        if self._scored:
            return {
                "ok": [
                    int(judge_image(image, text_of(caption)).ok)
                    for image, caption in zip(generated.images, captions, strict=True)
                ]
            }
        if part.policy == FULL:
            return {}
        reference = self._full_tokens(part.seed)
        pairs = zip(generated.images, reference, strict=True)
        likeness = [
            psnr(np.asarray(image), generator.runner.decode_image(tokens[None])[0])
            for image, tokens in pairs
        ]
        return {
            "psnr": likeness,
            "token_agreement": token_agreement(generated.tokens, reference).tolist(),
        }

    def _full_tokens(self, seed: int | None) -> np.ndarray:
        with np.load(Part(FULL, 1.0, seed).file(self.spec.out, ".npz")) as arrays:
            return arrays[arrays.files[0]]

    def _teacher_forced(self, policy: str, table: PolicyTable) -> dict[str, Any]:
        if self._scored:
            losses, kl = self._scene_losses.of(table)
            return {"losses": losses.tolist(), "kl": kl.tolist()}
        count = min(self.spec.num_scenes, self.spec.num_prompts)
        captions = self._prompts(self.spec.num_prompts, 0)[:count]
        sequences = self._model.sequences(
            captions, self._full_tokens(0)[:count], table.prompt_slots, unconditional=True
        )
        own = generation_defaults(self._checkpoint).cfg_scale
        cfg_scale = own if self.spec.cfg_scale is None else self.spec.cfg_scale
        return {"kl": kl_to_full_cache(self._model, sequences, table, cfg_scale).tolist()}


def _costs(generated: Generated, jobs: int) -> dict[str, Any]:
    """Figures of the compression, as allocated and counted, and the time that generating took."""
    cache = generated.cache
    return {
        "cache_bytes_per_image": cache.bytes_per_image,
        "image_share_of_full_cache": cache.image_share,
        "tokens_evicted_per_image": cache.tokens_evicted,
        "ms_per_token": generated.ms_per_token,
        "cpu_ms_per_token": generated.cpu_ms_per_token,
        "seconds_per_image": generated.seconds / len(generated.images),
        "jobs": jobs,
    }


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """The images in one row."""
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for index, image in enumerate(images):
        strip.paste(image, (index * image.width, 0))
    return strip


def read_strip(path: Path) -> Image.Image:
    """Reads the strip that side_by_side made. Raises: UserError where that is damaged, or no
    PNG.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as strip:
            if strip.width * strip.height > MAX_STRIP_PIXELS:
                raise UserError(f"{path} has {strip.width} x {strip.height} pixels; {WAY_OUT}")
            return strip.convert("RGB")
    except BROKEN as error:
        raise UserError(f"{path} is damaged ({error}); {WAY_OUT}") from None


def images_of(strip: Image.Image) -> Iterator[Image.Image]:
    """The square images that side_by_side put together."""
    for left in range(0, strip.width, strip.height):
        yield strip.crop((left, 0, left + strip.height, strip.height))
