"""Scene score: the share of captions, unseen in training, whose image shows exactly what they
say.

Captions are drawn evenly over the four categories; the checker (demo/checker.py) judges each
image. Captions and random numbers follow from the seed, so two bundles with one seed are compared
caption by caption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ssd_export.demo.checker import Verdict, check
from ssd_export.demo.scenes import CATEGORIES, SIZE, Scene, is_held_out, random_scene
from ssd_export.errors import UserError
from ssd_export.metrics.intervals import Share
from ssd_export.model.prompt import Prompt

if TYPE_CHECKING:
    from ssd_export.runtime.generate import CacheReport, ImageGenerator

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GenerateOptions:
    """Options of the generated images; cfg_scale and temperature None: the bundle's; lookahead: as
    for ImageGenerator.stream.
    """

    seed: int = 0
    batch: int = 16
    cfg_scale: float | None = None
    temperature: float | None = None
    lookahead: int | str = 1


@dataclass(frozen=True)
class SceneScore:
    """Scenes, images and verdicts of a score, in one order. ms_per_token: of the decode steps
    alone, at this batch.
    """

    scenes: list[Scene]
    verdicts: list[Verdict]
    images: list[Image.Image]
    tokens: np.ndarray
    seconds: float
    ms_per_token: float
    cache: CacheReport

    @property
    def overall(self) -> Share:
        """Share of images that show what their captions say."""
        return Share(sum(verdict.ok for verdict in self.verdicts), len(self.verdicts))

    @property
    def by_category(self) -> dict[str, Share]:
        """The share by category of the scenes."""
        return share_by_category(self.scenes, self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Scores, times and every verdict, as plain data; the images are left out."""
        pairs = zip(self.scenes, self.verdicts, strict=True)
        return {
            "overall": self.overall.to_dict(),
            "categories": {name: share.to_dict() for name, share in self.by_category.items()},
            "seconds": self.seconds,
            "seconds_per_image": self.seconds / len(self.images),
            "ms_per_token": self.ms_per_token,
            "cache_bytes_per_image": self.cache.bytes_per_image,
            "image_share_of_full_cache": self.cache.image_share,
            "tokens_evicted_per_image": self.cache.tokens_evicted,
            "images": [
                {
                    "category": scene.category,
                    "caption": scene.caption,
                    "ok": verdict.ok,
                    "reasons": list(verdict.reasons),
                }
                for scene, verdict in pairs
            ],
        }


def draw_scenes(
    num_scenes: int,
    seed: int,
    held_out: bool = True,
    categories: Sequence[str] = CATEGORIES,
) -> list[Scene]:
    """Scenes with captions that training never saw (or only ones that it may have), one category
    after the other.

    Any prefix is as even over the categories as it can be. Raises: UserError for num_scenes < 1.
    """
    if num_scenes < 1:
        raise UserError(f"--num-prompts {num_scenes} scores nothing; use 300")
    rng = np.random.default_rng([seed, 0x5CE4E])
    scenes: list[Scene] = []
    while len(scenes) < num_scenes:
        scene = random_scene(rng, categories[len(scenes) % len(categories)])
        if is_held_out(scene.caption) == held_out:
            scenes.append(scene)
    return scenes


def score_scenes(
    generator: ImageGenerator,
    scenes: Sequence[Scene],
    options: GenerateOptions,
    progress: Progress = lambda stage, done, total: None,
) -> SceneScore:
    """Generates an image of each caption and judges the images.

    progress: told the stage "generating ..." in grid rows of batches, then "judging".
    Raises: UserError for options that generate refuses.
    """
    generated = generate(generator, [scene.caption for scene in scenes], options, progress)
    verdicts = []
    for scene, image in zip(scenes, generated.images, strict=True):
        verdicts.append(judge_image(image, scene.caption))
        progress("judging", len(verdicts), len(scenes))
    return SceneScore(
        list(scenes),
        verdicts,
        generated.images,
        generated.tokens,
        generated.seconds,
        generated.ms_per_token,
        generated.cache,
    )


def judge_image(image: Image.Image, caption: str) -> Verdict:
    """The checker's verdict; an image of another size is first brought to that of a scene."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return check(image, caption)


def share_by_category(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """The share of right images of each category."""
    oks: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for scene, verdict in zip(scenes, verdicts, strict=True):
        oks[scene.category].append(verdict.ok)
    return {name: Share(sum(flags), len(flags)) for name, flags in oks.items() if flags}


@dataclass(frozen=True)
class Generated:
    """images, tokens int32 [N, image tokens] of N prompts. seconds: all of it; ms_per_token: decode
    steps only, by the clock and by what this process computed on all its threads."""

    images: list[Image.Image]
    tokens: np.ndarray
    seconds: float
    ms_per_token: float
    cpu_ms_per_token: float
    cache: CacheReport
    passes: float  # of a batch, on average


def generate(
    generator: ImageGenerator,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    progress: Progress = lambda stage, done, total: None,
) -> Generated:
    """One image for each prompt. The clock of a token runs over all grid rows of a batch but
    the first and the last, which hold the prefill and the image decoder."""
    if options.batch < 1:
        raise UserError(f"--batch {options.batch} generates nothing; use 16")
    grid = generator.config.grid
    total = grid.height * ceil(len(prompts) / options.batch)
    events = generator.stream(
        prompts,
        seed=options.seed,
        cfg_scale=options.cfg_scale,
        temperature=options.temperature,
        max_batch=options.batch,
        lookahead=options.lookahead,
    )
    began = last = _clocks()
    stepping, num_tokens, passes = np.zeros(2), 0, []
    for count, event in enumerate(events, start=1):
        now = _clocks()
        if 0 < event.row < grid.height - 1:
            start = (count - 1) // grid.height * options.batch
            stepping += now - last
            num_tokens += grid.width * (min(start + options.batch, len(prompts)) - start)
        if event.row == grid.height - 1:
            passes.append(generator.passes)
        last = now
        progress(f"generating {len(prompts)} images", count, total)
    passed, computed = (1000 * stepping / num_tokens).tolist()
    seconds = float((_clocks() - began)[0])
    return Generated(
        event.images or [],
        event.tokens,
        seconds,
        passed,
        computed,
        event.cache,
        float(np.mean(passes)),
    )


def _clocks() -> np.ndarray:
    """Seconds by the clock, and of this process on all its threads."""
    return np.array([time.perf_counter(), time.process_time()])
