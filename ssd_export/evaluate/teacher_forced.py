"""The model's logits for given image tokens under any cache policy, by the torch reference.

Given tokens fix the input of every step, so a picture is one pass through the layers; only the attention over the
cache is replayed token by token (R7), in each layer on its own. What the cache holds at step s is what it would hold
while drawing. Heads are permuted in the activations, not in the weights: one model serves every policy table, and
the permutation of the exporter is not taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_export.cache.attention import decode_attention, fill_from_prompt, prefill_attention
from ssd_export.cache.layout import group_slices, inverse_order, query_head_order, query_slices
from ssd_export.cache.state import GroupState
from ssd_export.cache.table import HeadGroup, PolicyTable
from ssd_export.config import NUM_IMAGE_TOKENS, ModelConfig
from ssd_export.demo.codes import encode_scene
from ssd_export.demo.scenes import Scene
from ssd_export.model.checkpoint import EMBED_TOKENS, Checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.prompt import PromptEncoder

LOGIT_ROWS = 8  # rows whose logits [rows, 576, V] are held at once
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sequences:
    """Prompts with image tokens. embeds [B, P, hidden], padded on the right; lengths int64 [B]; tokens int64 [B, 576]."""

    embeds: Tensor
    lengths: Tensor
    tokens: Tensor


class TeacherForced:
    """A checkpoint's weights in torch, asked what it would have drawn."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config, self._device, self._dtype = checkpoint.config, device, dtype
        self.model = load_model(checkpoint, device, dtype)
        self._checkpoint = checkpoint
        self._prompts = PromptEncoder.from_file(checkpoint.tokenizer_path)

    def sequences(self, prompts: Sequence[str], tokens: np.ndarray, prompt_slots: int, unconditional: bool = False) -> Sequences:
        """Conditional rows of N prompts with tokens [N, 576], then, if asked for, their N unconditional rows.

        Raises: UserError for a prompt that does not fit prompt_slots.
        """
        encoded = self._prompts.encode(prompts, prompt_slots)
        rows = len(prompts) * (2 if unconditional else 1)
        ids = torch.from_numpy(encoded.ids[:rows]).long()
        embeds = F.embedding(ids, self._checkpoint.tensor(EMBED_TOKENS)).to(self._device, self._dtype)
        lengths = torch.from_numpy(encoded.prompt_length[:rows]).long().to(self._device)
        image = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._device)
        return Sequences(embeds, lengths, image.repeat(2, 1) if unconditional else image)

    @torch.inference_mode()
    def hidden(self, sequences: Sequences, table: PolicyTable | None, progress: Progress = lambda stage, done, total: None) -> Tensor:
        """Final hidden states [B, 576, hidden]; image_logits of place s are those that token s is drawn from.

        Args: table: None is plain causal attention over everything; progress is told the layers.
        """
        padded = sequences.embeds.shape[1]
        image = self.model.embed_image_tokens(sequences.tokens[:, :-1])
        prompt_places = torch.arange(padded, device=self._device).expand(len(image), -1)
        image_places = sequences.lengths[:, None] + torch.arange(image.shape[1], device=self._device)
        attend = Replay(self.config, table, sequences.lengths, padded, progress)
        hidden = self.model(torch.cat([sequences.embeds, image], dim=1), torch.cat([prompt_places, image_places], dim=1), attend)
        rows = torch.arange(len(image), device=self._device)
        return torch.cat([hidden[rows, sequences.lengths - 1][:, None], hidden[:, padded:]], dim=1)

    @torch.inference_mode()
    def losses(self, sequences: Sequences, table: PolicyTable | None, progress: Progress = lambda stage, done, total: None) -> np.ndarray:
        """Mean cross entropy per image token of each row, float64 [B]."""
        hidden, losses = self.hidden(sequences, table, progress), []
        for part, target in zip(hidden.split(LOGIT_ROWS), sequences.tokens.split(LOGIT_ROWS)):
            logits = self.model.image_logits(part).float()
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            losses.append(loss.view(target.shape).double().mean(dim=1))
        return torch.cat(losses).cpu().numpy()


def scene_losses(
    model: TeacherForced, scenes: Sequence[Scene], table: PolicyTable | None, prompt_slots: int = 64,
    progress: Progress = lambda stage, done, total: None,
) -> np.ndarray:  # fmt: skip
    """Teacher-forced loss per image token of each true scene, float64 [N]; conditional rows, guidance plays no part."""
    tokens = np.stack([encode_scene(scene) for scene in scenes])
    sequences = model.sequences([scene.caption for scene in scenes], tokens, prompt_slots)
    return model.losses(sequences, table, progress)


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> ImageTokenModel:
    """The torch module with the checkpoint's weights; the text embedding table stays in the file."""
    with torch.device("meta"):
        model = ImageTokenModel(checkpoint.config)
    state = {name: checkpoint.tensor(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.language_model.rope = type(model.language_model.rope)(checkpoint.config.head_dim, checkpoint.config.rope_theta)
    return model.eval().requires_grad_(False)


class Replay:
    """`attend` of the decoder: the prompt densely (R8), then the image tokens under the policy (R7)."""

    def __init__(
        self, config: ModelConfig, table: PolicyTable | None, lengths: Tensor, padded: int,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:  # fmt: skip
        self._config, self._table, self._lengths, self._padded = config, table, lengths, padded
        self._progress = progress

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # query [B, Hq, P + 575, D]; key, value [B, H, P + 575, D]
        if self._table is None:
            out = dense_attention(query, key, value, self._lengths, self._padded)
        else:
            out = self._permuted(layer, query, key, value)
        self._progress("teacher forcing", layer + 1, self._config.num_layers)
        return out

    def _permuted(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, order = self._table.layers[layer], list(self._table.head_order[layer])
        query_order = list(query_head_order(order, self._config.query_group_size))
        query, key, value = query[:, query_order], key[:, order], value[:, order]
        parts = [
            self._group(group, query[:, queries], key[:, heads], value[:, heads])
            for group, heads, queries in zip(
                groups, group_slices(groups), query_slices(groups, self._config.query_group_size), strict=True
            )
        ]
        return torch.cat(parts, dim=1)[:, list(inverse_order(query_order))]

    def _group(self, group: HeadGroup, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if group.num_slots >= self._table.prompt_slots + NUM_IMAGE_TOKENS:  # nothing is ever evicted (R9)
            return dense_attention(query, key, value, self._lengths, self._padded)
        return replay(group, query, key, value, self._lengths, self._padded, self._table.score_decay)


def replay(group: HeadGroup, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, padded: int, score_decay: float) -> Tensor:
    """Attention of a head group over prompt and image tokens, one token at a time through its cache; [B, Hq, T, D]."""
    state = GroupState.empty(len(key), group, key.shape[-1], key.dtype, key.device)
    prompt = slice(0, padded)
    out = torch.empty_like(query)
    out[:, :, prompt], scores = prefill_attention(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], lengths)
    fill_from_prompt(state, key[:, :, prompt], value[:, :, prompt], scores, lengths)
    for place in range(padded, key.shape[2]):
        out[:, :, place] = decode_attention(
            query[:, :, place], key[:, :, place], value[:, :, place], state, group, lengths, lengths + (place - padded), score_decay
        )
    return out


def dense_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, padded: int) -> Tensor:
    """Causal attention over prompt and image tokens, the prompt's padding (places length to padded) left out."""
    place = torch.arange(key.shape[2], device=key.device)
    held = (place < lengths[:, None]) | (place >= padded)  # [B, T]
    held = held[:, None] & (place[None, :] <= place[:, None])  # [B, T of the query, T of the key]
    held |= torch.eye(len(place), dtype=torch.bool, device=key.device)  # padding sees itself: softmax of nothing is NaN
    size = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(size, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, held[:, None])
