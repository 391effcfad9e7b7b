"""Inputs that start a batch of images: embedded prompts, random numbers and the sampling, made in
one place for every caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.model.families import PromptEncoder, prompt_encoder
from ssd_export.model.prompt import EncodedPrompts, Prompt
from ssd_export.noise import ImageSeed
from ssd_export.sampling import Sampling


@dataclass(frozen=True)
class ImageRequest:
    """One image: its prompt, how its tokens are drawn, what its random numbers depend on.

    negative_prompt: what guidance leads away from; "" is the model's own unconditional row.
    """

    prompt: Prompt
    sampling: Sampling
    image: ImageSeed
    negative_prompt: str = ""


@dataclass(frozen=True)
class PromptBatch:
    """Inputs that start a batch of N images.

    embeds: float32 [rows, T, condition_dim], padded on the right; lengths: int32 [rows]; images,
    sampling: what each image's random numbers depend on, and how its tokens are drawn. rows: N or,
    with guidance, 2 N, the conditional ones first.
    """

    embeds: np.ndarray
    lengths: np.ndarray
    images: tuple[ImageSeed, ...]
    sampling: tuple[Sampling, ...]

    @property
    def num_images(self) -> int:
        """Images of the batch."""
        return len(self.images)

    def different_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(the first row of each prompt, int64; for every row the place of its prompt among those,
        int64 [rows]). Unconditional rows of prompts of one length are the same.
        """
        places: dict[bytes, int] = {}
        first, place = [], []
        for row, (embeds, length) in enumerate(zip(self.embeds, self.lengths, strict=True)):
            prompt = embeds[:length].tobytes()
            if prompt not in places:
                places[prompt] = len(places)
                first.append(row)
            place.append(places[prompt])
        return np.array(first), np.array(place)

    @property
    def is_greedy(self) -> bool:
        """Whether no image needs random numbers."""
        return all(sampling.temperature == 0 for sampling in self.sampling)

    @property
    def uses_top_k(self) -> bool:
        """Whether any image samples with top-k."""
        return any(sampling.top_k > 0 for sampling in self.sampling)

    def sampling_inputs(self) -> Mapping[str, np.ndarray]:
        """cfg_scale, temperature and top_k of each image, as the graphs take them."""
        return sampling_inputs(self.sampling)


def sampling_inputs(sampling: Sequence[Sampling]) -> Mapping[str, np.ndarray]:
    """cfg_scale and temperature float32 [N], top_k int64 [N] of N images."""
    dtypes = {"cfg_scale": np.float32, "temperature": np.float32, "top_k": np.int64}
    return {
        name: np.array([getattr(one, name) for one in sampling], dtype)
        for name, dtype in dtypes.items()
    }


@dataclass(frozen=True)
class PromptBatches:
    """Makes the batches of one model.

    embed: float32 [..., condition_dim] of ids [...]; prompt_slots: the longest prompt, in tokens.
    """

    encoder: PromptEncoder
    embed: Callable[[np.ndarray], np.ndarray]
    prompt_slots: int

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> PromptBatches:
        """Opens tokenizer and embeddings of a bundle. Raises: UserError for a damaged tokenizer."""
        return cls(
            prompt_encoder(bundle.config.model, bundle.file),
            TextEmbeddings(bundle),
            bundle.config.policy.prompt_slots,
        )

    def check(self, requests: Sequence[ImageRequest]) -> list[int]:
        """The tokens of each prompt, control tokens included.

        Raises: UserError for no prompt, one that cannot be encoded, or a negative prompt that would
        do nothing.
        """
        for request in requests:
            if request.negative_prompt.strip() and request.sampling.cfg_scale == 1:
                raise UserError(
                    "a negative prompt does nothing at cfg_scale 1, which is no guidance; use 5, or"
                    " leave it out"
                )
        encoded = self._encoded(requests)
        return [int(length) for length in encoded.prompt_length[: len(requests)]]

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, first_image: int = 0
    ) -> PromptBatch:
        """A batch of one image a prompt, all drawn in the same way.

        Args: first_image: the number of the first one. Image i is the same in any batch: its random
        numbers depend on seed and i alone.
        Raises: UserError for no prompt, or one that cannot be encoded.
        """
        return self.of_requests(
            [
                ImageRequest(prompt, sampling, ImageSeed(seed, first_image + place))
                for place, prompt in enumerate(prompts)
            ]
        )

    def of_requests(self, requests: Sequence[ImageRequest]) -> PromptBatch:
        """A batch of images, each with its own prompts, sampling and random numbers.

        Raises: UserError for no prompt, one that cannot be encoded, or guidance of a model that has
        no unconditional row.
        """
        encoded = self._encoded(requests)
        return PromptBatch(
            encoded.embeds(self.embed),
            encoded.prompt_length,
            tuple(request.image for request in requests),
            tuple(request.sampling for request in requests),
        )

    def _encoded(self, requests: Sequence[ImageRequest]) -> EncodedPrompts:
        negative_prompts = [request.negative_prompt for request in requests]
        encoded = self.encoder.encode(
            [request.prompt for request in requests],
            self.prompt_slots,
            negative_prompts if any(negative_prompts) else (),
        )
        has_guidance = len(encoded.prompt_length) > len(requests)
        if not has_guidance and any(request.sampling.cfg_scale != 1 for request in requests):
            raise UserError(
                "the model has no unconditional row, so there is no guidance: use --cfg-scale 1"
            )
        return encoded


class TextEmbeddings:
    """Rows of the text embedding table, read from the mapped weights file; the table itself is
    never loaded.
    """

    def __init__(self, bundle: Bundle) -> None:
        entry = bundle.config.text_embeddings
        self._is_bfloat16 = entry.dtype == "bfloat16"
        dtype = DTYPES[entry.dtype].numpy
        with bundle.using(entry.file) as path:
            try:
                self._table = np.memmap(path, dtype, "r", entry.offset, entry.shape)
            except (
                ValueError,
                OSError,
                OverflowError,
            ) as error:  # also ENOMEM of a limited process
                raise UserError(
                    f"{path} cannot be mapped as the table of text embeddings ({error}); export the"
                    " bundle again with --force, or copy it again from where it came"
                ) from error

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [..., condition_dim] of ids [...]."""
        rows = np.asarray(self._table[ids])
        if self._is_bfloat16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def bundle_sampling(bundle: Bundle) -> Sampling:
    """The guidance and temperature that the bundle's checkpoint came with."""
    defaults = bundle.config.generation
    return Sampling(defaults.cfg_scale, defaults.temperature)
