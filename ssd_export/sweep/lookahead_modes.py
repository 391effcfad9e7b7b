"""Lookahead of a cell's policy: how many passes an image takes, and what time, by mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssd_export.metrics.scene_score import Generated, GenerateOptions, generate
from ssd_export.model.prompt import Prompt
from ssd_export.plan.lookahead import OFF
from ssd_export.runtime.generate import ImageGenerator

IMAGES = 8  # of each mode, one at a time
Figures = dict[str, Any]


def lookahead_figures(
    generator: ImageGenerator,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    modes: Sequence[int | str],
) -> list[Figures]:
    """Passes of an image, tokens of a pass and milliseconds of a token for single steps and each
    mode, on the first prompts, in turns; and how many images have the tokens of single steps.

    Raises: UserError where the runner cannot.
    """
    every = (OFF, *modes)
    made: dict[int | str, list[Generated]] = {mode: [] for mode in every}
    for prompt in prompts[:IMAGES]:
        for mode in every:
            alone = replace(options, batch=1, lookahead=mode)
            made[mode].append(generate(generator, [prompt], alone))
    return [_figures(generator, mode, made[mode], made[OFF]) for mode in every]


def _figures(
    generator: ImageGenerator,
    mode: int | str,
    images: Sequence[Generated],
    single_steps: Sequence[Generated],
) -> Figures:
    passes = float(np.mean([image.passes for image in images]))
    cpu_ms, off = (
        float(np.mean([image.cpu_ms_per_token for image in some]))
        for some in (images, single_steps)
    )
    return {
        "mode": "off" if mode == OFF else str(mode),
        "images": len(images),
        "same_tokens": sum(
            bool((ours.tokens == theirs.tokens).all())
            for ours, theirs in zip(images, single_steps, strict=True)
        ),
        "passes": passes,
        "tokens_a_pass": (generator.config.grid.num_tokens - 1) / passes,
        "ms_per_token": float(np.mean([image.ms_per_token for image in images])),
        "cpu_ms_per_token": cpu_ms,
        "times_faster": off / cpu_ms,
    }
