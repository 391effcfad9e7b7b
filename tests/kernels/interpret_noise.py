"""Runs the noise kernel through Triton's interpreter and prints how many numbers differ from
numpy's in their bits.

python -m tests.kernels.interpreted -m tests.kernels.interpret_noise. One JSON line for each case.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from ssd_export.kernels.gumbel_noise import fill_noise
from ssd_export.kernels.noise_image import image_words
from ssd_export.noise import GumbelNoise, ImageSeed

IMAGES = (ImageSeed(5, 0), ImageSeed(2**64 - 1, 3), ImageSeed(2**40 + 7, 2**32 - 1))
CASES = ((50, range(1)), (1664, range(574, 576)), (2051, range(23, 25)), (4, range(7)))


def result(codebook_size: int, steps: range) -> dict[str, int]:
    expected = GumbelNoise(IMAGES, codebook_size)(steps)
    noise = torch.zeros(len(steps) + 1, len(IMAGES), codebook_size)
    fill_noise(noise, torch.from_numpy(image_words(IMAGES)), steps)
    different = noise[: len(steps)].numpy().view(np.int32) != expected.view(np.int32)
    return {
        "codebook_size": codebook_size,
        "different": int(different.sum()),
        "written_outside": int((noise[len(steps) :] != 0).sum()),
    }


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(result(*case)), flush=True)
