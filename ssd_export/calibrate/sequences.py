"""Images that the model itself generates with the full cache, and the sequences that measuring
starts from: heads are measured on what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssd_export.calibrate.neighborhood import Neighborhood
from ssd_export.calibrate.prompts import hash_of_prompts
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import PromptEncoder
from ssd_export.model.prompt import Prompt
from ssd_export.policy.make import make_policy
from ssd_export.runtime.loop import decode
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.sampling import Sampling


@dataclass(frozen=True)
class ImagesSpec:
    """Settings of the images whose heads are measured. Image i shows prompt i modulo their number;
    prompt_slots is what `export` will use.
    """

    prompts: tuple[Prompt, ...]
    num_images: int
    neighborhood: Neighborhood
    seed: int
    sampling: Sampling
    prompt_slots: int

    @property
    def prompts_hash(self) -> str:
        """sha256 of the prompts: text, or the numbers of embeddings."""
        return hash_of_prompts(self.prompts)


class FullCacheImages:
    """Generates image tokens from a model with the text embedding, on the device it is on."""

    def __init__(self, model: ImageTokenModel, encoder: PromptEncoder, prompt_slots: int) -> None:
        @torch.inference_mode()
        def embed(ids: np.ndarray) -> np.ndarray:
            return model.embed_text_tokens(torch.from_numpy(ids).long()).float().numpy()

        self.batches = PromptBatches(encoder, embed, prompt_slots)
        self._table = make_policy("full", model.config, budget=1.0, prompt_slots=prompt_slots)
        self._runner = TorchRunner(model, None, self._table)

    def __call__(
        self,
        batch: PromptBatch,
        parts: Sequence[range] | None = None,
        row_done: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Tokens int32 [N, image tokens] of a batch that `batches` made.

        Args: parts: decode steps to take, as `decode` has them; row_done: called after each part.
        """
        steps = decode(self._runner, batch, self._table, parts)
        next(steps)
        for _ in steps:
            row_done()
        return self._runner.tokens()


@torch.no_grad()
def sequence_of(
    model: ImageTokenModel, prompts: Sequence[np.ndarray], tokens: np.ndarray
) -> Tensor:
    """Hidden states [B, L + image tokens - 1, hidden] that teacher forcing starts from; prompts:
    rows' embeddings float32 [L, condition_dim], of one length L, without padding.

    The last token is generated and never read.
    """
    image = model.embed_image_tokens(torch.from_numpy(tokens[:-1].astype(np.int64)))
    embeds = torch.from_numpy(np.stack(prompts)).to(image.device, image.dtype)
    prompt = model.condition(embeds)
    return torch.cat([prompt, image.expand(len(prompts), -1, -1)], dim=1)
