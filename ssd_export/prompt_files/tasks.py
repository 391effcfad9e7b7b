"""The images of a file of prompts: what each is made from, and the name of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ssd_export.errors import UserError
from ssd_export.noise import ImageSeed
from ssd_export.prompt_files.lines import PromptLine
from ssd_export.runtime.prompt_batch import ImageRequest
from ssd_export.sampling import Sampling

MAX_IMAGES = 1_000_000  # of one file, over all its lines


@dataclass(frozen=True)
class Defaults:
    """Defaults for lines that do not say otherwise. sampling: of the bundle or the options."""

    seed: int
    negative_prompt: str
    sampling: Sampling


@dataclass(frozen=True)
class ImageTask:
    """Image `image` of the prompt of line `line`."""

    line: int
    image: int
    request: ImageRequest

    @property
    def prompt(self) -> str:
        """The text: files hold no other prompts."""
        assert isinstance(self.request.prompt, str)
        return self.request.prompt

    @property
    def file_name(self) -> str:
        """The name of the image in the folder of results."""
        """Name of the image's file: its line and its number there."""
        return f"{self.line:06d}-{self.image}.png"


def image_tasks(
    lines: Mapping[int, PromptLine], num_images: int, defaults: Defaults
) -> list[ImageTask]:
    """The images in the order of the file.

    A line with a seed gives the images of `generate PROMPT --seed SEED`; the others those of one
    call with the prompts of the file.
    Raises: UserError for more images than a file may ask for.
    """
    if len(lines) * num_images > MAX_IMAGES:
        raise UserError(
            f"{len(lines)} prompts of {num_images} images each are more than {MAX_IMAGES}; split"
            " the file"
        )
    tasks = []
    for place, (number, line) in enumerate(lines.items()):
        sampling = defaults.sampling.changed(line.cfg_scale, line.temperature, line.top_k)
        negative = line.negative_prompt
        negative = defaults.negative_prompt if negative is None else negative
        for image in range(num_images):
            seed = (
                ImageSeed(defaults.seed, place * num_images + image)
                if line.seed is None
                else ImageSeed(line.seed, image)
            )
            request = ImageRequest(line.prompt, sampling, seed, negative)
            tasks.append(ImageTask(number, image, request))
    return tasks
