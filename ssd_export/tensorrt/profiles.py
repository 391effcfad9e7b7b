"""Optimization profiles: the sizes that each engine is tuned for.

Each graph has its own, because they run at different sizes. A decode step is tuned apart for one
image, for a few and for many: one profile over all of them would be tuned for one of these and slow
at the others. The prompt always has its full length (shorter ones are padded), and the image
decoder takes one image or one fixed number of them: its intermediate results are 190 MB an image at
Janus- Pro's shape, so a range up to the largest batch asks for more than the workspace. A pass of
lookahead has always as many places, so that it is captured once and compiled for one shape; it is
for the batches whose steps wait for the weights, not for many images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ssd_export.graph_spec import Dimension
from ssd_export.tensorrt.step_form import DECODE_STEP, DECODE_WINDOW, size_of
from ssd_export.tensorrt.target import Batch
from ssd_export.typed_json import ABSENT_BY_DEFAULT

Bounds = tuple[int, int, int]  # least, tuned for, greatest
SMALL_BATCHES = (
    (1, 1),
    (2, 16),
)  # first and last batch of the decode step's profiles before the last
IMAGE_DECODER = "image_decoder"


@dataclass(frozen=True)
class Profile:
    """Bounds of every named dimension of a graph's contract. window: places of a pass of lookahead,
    0 in graphs that have none.
    """

    images: Bounds
    prompt_tokens: Bounds
    window: int = field(default=0, metadata=ABSENT_BY_DEFAULT)

    def sizes(self, dimension: Dimension, rows_per_image: int) -> Bounds:
        """Bounds of a dimension. Raises: KeyError for a name that no contract has."""
        least, usual, most = (
            size_of(
                dimension,
                {
                    "images": images,
                    "rows": rows_per_image * images,
                    "prompt_tokens": tokens,
                    "window": self.window,
                },
            )
            for images, tokens in zip(self.images, self.prompt_tokens, strict=True)
        )
        return least, usual, most


MOST_WITH_WINDOWS = SMALL_BATCHES[-1][1]  # images of a pass of lookahead


def profiles_of(
    graph: str, batch: Batch, prompt_slots: int, decoder_images: int, window: int = 0
) -> tuple[Profile, ...]:
    """The profiles of a graph's engine, disjoint in images.

    Args: decoder_images: how many images the image decoder takes at a time besides one; window:
    places of a pass of lookahead.
    """
    prompt = (prompt_slots,) * 3
    if graph == IMAGE_DECODER:
        counts = sorted({1, min(decoder_images, batch.max)})
        return tuple(Profile((count,) * 3, prompt) for count in counts)
    if graph.startswith(DECODE_STEP):
        return tuple(Profile(bounds, prompt) for bounds in _decode_ranges(batch))
    if graph.startswith(DECODE_WINDOW):
        few = Batch(batch.min, min(batch.opt, MOST_WITH_WINDOWS), min(batch.max, MOST_WITH_WINDOWS))
        return tuple(Profile(bounds, prompt, window) for bounds in _decode_ranges(few))
    return (Profile((batch.min, batch.opt, batch.max), prompt),)


def _decode_ranges(batch: Batch) -> list[Bounds]:
    """The batch's range cut where other tactics win. A part is tuned for the batch asked for where
    it holds that, else for its greatest: whoever generates several images wants many at once."""
    ranges = [*SMALL_BATCHES, (SMALL_BATCHES[-1][1] + 1, batch.max)]
    parts = [(max(first, batch.min), min(last, batch.max)) for first, last in ranges]
    return [
        (first, batch.opt if first <= batch.opt <= last else last, last)
        for first, last in parts
        if first <= last
    ]


def profile_for(profiles: Sequence[Profile], num_images: int) -> int | None:
    """The number of the profile, as engine.json lists them, that takes this many images."""
    for number, profile in enumerate(profiles):
        if profile.images[0] <= num_images <= profile.images[2]:
            return number
    return None
