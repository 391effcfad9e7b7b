"""Tokens of two runners compared: equal, but where the two best codes of a race are closer than
rounding."""

from __future__ import annotations

import numpy as np

from ssd_export.noise import GumbelNoise
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.loop import decode, single_steps
from ssd_export.runtime.prompt_batch import PromptBatch

# Guided logits of two runners in float32 differ by up to 7e-5 on the tests' models at cfg_scale 5.
NEAR_TIE = 2e-4


def assert_same_tokens(
    first: tuple[np.ndarray, ImageGenerator],
    second: tuple[np.ndarray, ImageGenerator],
    batch: PromptBatch,
) -> set[int]:
    """The images that a near tie parts. Raises: AssertionError where another token was drawn
    otherwise.

    Draws again up to the first difference of each such image, both runners in step.
    """
    different = first[0] != second[0]
    parted = {
        int(image): int(np.flatnonzero(different[image])[0])
        for image in np.flatnonzero(different.any(axis=1))
    }
    if not parted:
        return set()
    runner = first[1].runner
    for steps in decode(runner, batch, first[1].table, single_steps(max(parted.values()) + 1)):
        for image in [image for image, step in parted.items() if step == steps.start]:
            race = race_of(runner.logits(), batch, image, steps.start)
            tokens = [result[0][image, steps.start] for result in (first, second)]
            margin = abs(float(race[tokens[0]] - race[tokens[1]]))
            assert margin <= NEAR_TIE and race.max() - race[tokens].min() <= NEAR_TIE, (
                f"image {image}, step {steps.start}: tokens {tokens}, margin {margin:.2e}"
            )
    return set(parted)


def race_of(logits: np.ndarray, batch: PromptBatch, image: int, step: int) -> np.ndarray:
    """Guided logits plus noise of an image's draw, float64 [V]."""
    conditional, unconditional = logits[[image, image + batch.num_images]].astype(np.float64)
    sampling = batch.sampling[image]
    guided = unconditional + sampling.cfg_scale * (conditional - unconditional)
    noise = GumbelNoise([batch.images[image]], len(guided))(range(step, step + 1))
    return guided + sampling.temperature * noise[0, 0]
