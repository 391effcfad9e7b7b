"""Pictures with the full cache, straight from a checkpoint: what the model is measured on is what
it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_export.config import ModelConfig
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.prompt import EncodedPrompts
from ssd_export.runtime.torch_runner import draw_tokens
from ssd_export.sampling import Sampling

SMALL = 500_000_000  # parameters; 2 GB in float32


def load_model(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    text_embedding: bool = True,
) -> ImageTokenModel:
    """The model with the checkpoint's weights in one dtype, one copy in memory.

    Without dtype a small model is float32, which a CPU computes several times faster than fp16; a
    large one keeps its own. Without text_embedding the table of text tokens, which only prompts
    need, stays in the file.
    """
    with torch.device("meta"):
        model = ImageTokenModel(checkpoint.config, text_embedding)
    names = list(model.state_dict())
    own = checkpoint.tensor(next(name for name in names if name.endswith("q_proj.weight"))).dtype
    dtype = dtype or (torch.float32 if is_small(model) else own)
    model.load_state_dict(
        {name: checkpoint.tensor(name, dtype).to(device) for name in names}, assign=True
    )
    return model.eval().requires_grad_(False)


def is_small(model: ImageTokenModel) -> bool:
    """Whether a CPU passes through it in a fraction of a second."""
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL


def decode_picture(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """Pixels uint8 [height, width, 3] of image tokens [grid tokens]."""
    with torch.device("meta"):
        decoder = ImageDecoder(checkpoint.config)
    decoder.load_state_dict(
        {name: checkpoint.tensor(name, torch.float32) for name in decoder.state_dict()}, assign=True
    )
    with torch.inference_mode():
        pixels = decoder.eval()(torch.from_numpy(tokens.astype(np.int64))[None])[0]
    return ((pixels + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()


class FullCache:
    """Keys and values of every token of a batch; rows may have prompts of different length.

    Prompt tokens stand in places 0 .. T - 1, padding included, image token i in place T + i.
    """

    def __init__(
        self, config: ModelConfig, prompt_length: Tensor, num_prompt_places: int, dtype: torch.dtype
    ) -> None:
        shape = (
            config.num_layers,
            2,
            len(prompt_length),
            config.num_kv_heads,
            num_prompt_places + config.grid.num_tokens,
            config.head_dim,
        )
        self._kv = torch.zeros(shape, dtype=dtype)
        self._prompt_length, self._num_prompt_places = prompt_length, num_prompt_places
        self._grouped = config.query_group_size > 1
        place = torch.arange(num_prompt_places + config.grid.num_tokens)
        self._held = (place < prompt_length[:, None]) | (place >= num_prompt_places)  # [B, places]
        self._end = 0

    def positions(self, count: int) -> Tensor:
        """Makes room for `count` more tokens a row; their positions, int64 [B, count]."""
        place = torch.arange(self._end, self._end + count)
        self._end += count
        is_prompt = place < self._num_prompt_places
        return torch.where(
            is_prompt, place, self._prompt_length[:, None] + place - self._num_prompt_places
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = query.shape[2]
        self._kv[layer, 0, :, :, self._end - count : self._end] = key
        self._kv[layer, 1, :, :, self._end - count : self._end] = value
        keys, values = self._kv[layer, :, :, :, : self._end]
        if count > 1:  # the prompt: causal; what padding reads is never used
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=self._grouped
            )
        mask = self._held[:, None, None, : self._end]
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=self._grouped
        )


@torch.inference_mode()
def draw_pictures(
    model: ImageTokenModel,
    prompts: EncodedPrompts,
    uniforms: np.ndarray,
    sampling: Sampling,
    row_drawn: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Image tokens int32 [N, grid tokens].

    Args: prompts of rows_per_image x N rows; uniforms float32 [grid tokens, N] in [0, 1), fewer
    where only the first tokens are wanted; row_drawn is called after every grid row.
    """
    lengths, ids = (
        torch.from_numpy(prompts.prompt_length).long(),
        torch.from_numpy(prompts.ids).long(),
    )
    hidden = model.embed_text_tokens(ids)
    cache = FullCache(model.config, lengths, ids.shape[1], hidden.dtype)
    drawn = torch.from_numpy(np.ascontiguousarray(uniforms))
    hidden = model(hidden, cache.positions(ids.shape[1]), cache.attend)
    last = hidden[torch.arange(len(ids)), lengths - 1]
    rows, width = model.config.rows_per_image, model.config.grid.width
    tokens = [draw_tokens(model.image_logits(last).float(), drawn[0], sampling)]
    for step in range(1, len(drawn)):
        hidden = model.embed_image_tokens(tokens[-1].long()).repeat(rows, 1)[:, None]
        hidden = model(hidden, cache.positions(1), cache.attend)
        tokens.append(draw_tokens(model.image_logits(hidden[:, 0]).float(), drawn[step], sampling))
        if (step + 1) % width == 0:
            row_drawn()
    return torch.stack(tokens, dim=1).numpy()


@torch.no_grad()
def sequence_of(model: ImageTokenModel, ids: Sequence[np.ndarray], tokens: np.ndarray) -> Tensor:
    """Hidden states [B, L + grid tokens - 1, hidden] that teacher forcing starts from; ids: rows of one length
    L, without padding.

    The last token is drawn and never read.
    """
    image = model.embed_image_tokens(torch.from_numpy(tokens[:-1].astype(np.int64)))
    prompt = model.embed_text_tokens(torch.from_numpy(np.stack(ids).astype(np.int64)))
    return torch.cat([prompt, image.expand(len(ids), -1, -1)], dim=1)
