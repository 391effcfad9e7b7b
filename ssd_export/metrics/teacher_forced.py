"""The model's loss on given image tokens under any cache policy: torch, the rules of the cache, no
generating.

Given tokens fix the input of every step, so an image is one pass through the layers, and what a
policy loses in one layer reaches the next. Attention is replayed a block between two evictions at a
time (cache/replay.py). Heads are permuted in the activations, not in the weights: one model
serves every policy table, and the permutation of the exporter is not taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_export.cache.replay import DenseAttention, attend_with_option
from ssd_export.config import EMBED_TOKENS, ModelConfig
from ssd_export.demo.codes import encode_scene
from ssd_export.demo.scenes import Scene
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.families import prompt_encoder
from ssd_export.model.load import load_model
from ssd_export.model.prompt import Prompt
from ssd_export.policy.layout import group_slices, inverse_order, query_head_order
from ssd_export.policy.table import HeadGroup, PolicyTable

ROWS = 8  # rows that go through the layers together: attention of one layer is [rows, heads, T, T]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sequences:
    """Prompts with image tokens: embeds [B, P, hidden], padded on the right; lengths int64 [B];
    tokens int64 [B, I], I being the number of image tokens.
    """

    embeds: Tensor
    lengths: Tensor
    tokens: Tensor

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(prompt length, rows): at most ROWS rows whose prompts have one length, until every row
        was there once.
        """
        for length in self.lengths.unique().tolist():
            for rows in (self.lengths == length).nonzero()[:, 0].split(ROWS):
                yield length, rows


class TeacherForced:
    """A checkpoint's weights in torch, asked what it would have generated."""

    def __init__(
        self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self._device, self._dtype = checkpoint.config, device, dtype
        self.model = load_model(checkpoint, device, dtype, text_embedding=False)
        self._checkpoint = checkpoint
        self._prompts = prompt_encoder(checkpoint.config, checkpoint.file)

    def sequences(
        self,
        prompts: Sequence[Prompt],
        tokens: np.ndarray,
        prompt_slots: int,
        unconditional: bool = False,
    ) -> Sequences:
        """Conditional rows of N prompts with tokens [N, I], then, if asked for, their N
        unconditional rows.

        Raises: UserError for a prompt that does not fit prompt_slots.
        """
        encoded = self._prompts.encode(prompts, prompt_slots)
        rows = len(encoded.prompt_length) if unconditional else len(prompts)
        table = self._checkpoint.tensor(EMBED_TOKENS).float()
        embeds = torch.from_numpy(
            encoded.embeds(lambda ids: F.embedding(torch.from_numpy(ids).long(), table).numpy())
        )[:rows].to(self._device, self._dtype)
        lengths = torch.from_numpy(encoded.prompt_length[:rows]).long().to(self._device)
        image = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._device)
        return Sequences(embeds, lengths, image.repeat(rows // len(prompts), 1))

    @torch.inference_mode()
    def hidden(
        self,
        sequences: Sequences,
        table: PolicyTable | None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Tensor:
        """Final hidden states [B, I, hidden]; image_logits of place s are those that token s is
        drawn from.

        Args: table: None is plain causal attention over everything; progress is told the rows.
        """
        hidden = sequences.embeds.new_empty(*sequences.tokens.shape, self.config.hidden_size)
        done = 0
        for length, rows in sequences.parts():
            image = self.model.embed_image_tokens(sequences.tokens[rows, :-1])
            prompt = self.model.condition(sequences.embeds[rows, :length])
            both = torch.cat([prompt, image], dim=1)
            places = torch.arange(both.shape[1], device=self._device).expand(len(rows), -1)
            replay = Replay(self.config, table, length)
            hidden[rows] = self.model(both, places, replay, length)[:, length - 1 :]
            done += len(rows)
            progress("teacher forcing", done, len(hidden))
        return hidden

    @torch.inference_mode()
    def losses(self, hidden: Tensor, tokens: Tensor) -> np.ndarray:
        """Mean cross entropy per image token of each row, float64 [B]; hidden as `hidden` gives it,
        tokens [B, I].
        """
        losses = []
        for part, target in zip(hidden.split(ROWS), tokens.split(ROWS)):
            logits = self.model.image_logits(part).float()
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            losses.append(loss.view(target.shape).double().mean(dim=1))
        return torch.cat(losses).cpu().numpy()

    @torch.inference_mode()
    def divergence(self, full: Tensor, hidden: Tensor) -> np.ndarray:
        """Mean KL(full || other) per image token of each row in nats, float64 [B]: what a loss
        shows only beside luck.
        """
        parts = []
        for one, other in zip(full.split(ROWS), hidden.split(ROWS)):
            p, q = (
                self.model.image_logits(part).float().log_softmax(dim=-1) for part in (one, other)
            )
            parts.append((p.exp() * (p - q)).sum(dim=-1).double().mean(dim=1))
        return torch.cat(parts).cpu().numpy()


class SceneLosses:
    """Losses of true scenes under any policy, conditional rows alone: guidance plays no part."""

    def __init__(
        self, model: TeacherForced, scenes: Sequence[Scene], prompt_slots: int = 64
    ) -> None:
        """Raises UserError for a caption that does not fit prompt_slots."""
        tokens = np.stack([encode_scene(scene) for scene in scenes])
        self._model, self._sequences = (
            model,
            model.sequences([scene.caption for scene in scenes], tokens, prompt_slots),
        )
        self._full = model.hidden(self._sequences, None)

    def of(self, table: PolicyTable) -> tuple[np.ndarray, np.ndarray]:
        """(loss per image token, KL from the full cache per image token) of each scene, float64
        [N].
        """
        hidden = self._model.hidden(self._sequences, table)
        return self._model.losses(hidden, self._sequences.tokens), self._model.divergence(
            self._full, hidden
        )


class Replay:
    """`attend` of the decoder for rows of one prompt length: the prompt densely (R8), image tokens
    as the policy keeps them (R7)."""

    def __init__(self, config: ModelConfig, table: PolicyTable | None, prompt_length: int) -> None:
        self._config, self._table, self._prompt_length = config, table, prompt_length

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends as the policy's cache would in this layer: query [B, Hq, T, D] -> [B, Hq, T,
        D].
        """
        # query [B, Hq, T, D]; key, value [B, H, T, D]
        table = self._table
        if table is None or not self._ever_full(table, layer):
            grouped = query.shape[1] > key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
        groups, order = table.layers[layer], list(table.head_order[layer])
        query_order = list(query_head_order(order, self._config.query_group_size))
        dense = DenseAttention.compute(
            query[:, query_order], key[:, order], value[:, order], self._prompt_length, table.grid
        )
        slices = zip(groups, group_slices(groups), strict=True)
        image = [self._image_part(table, dense, group, heads) for group, heads in slices]
        out = torch.cat([dense.out[:, :, :, : self._prompt_length], torch.cat(image, dim=1)], dim=3)
        return out.flatten(1, 2)[:, list(inverse_order(query_order))].to(query.dtype)

    @staticmethod
    def _ever_full(table: PolicyTable, layer: int) -> bool:
        return any(group.can_fill(table.prompt_slots, table.grid) for group in table.layers[layer])

    @staticmethod
    def _image_part(
        table: PolicyTable, dense: DenseAttention, group: HeadGroup, heads: slice
    ) -> Tensor:
        option = table.option(group)
        return attend_with_option(dense, option, table.prompt_slots, table.score_decay, heads)
