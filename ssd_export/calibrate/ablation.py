"""Measures how the next-token distribution changes when one head alone is served from fewer slots,
for every option of every head.

The read of one KV head is replaced in one layer and passed on through the layers above it. Exact,
where Fisher's information (sensitivity.py) is an estimate for small errors; the price is (KV heads
x options) passes through the layers above, for each layer, instead of one pass back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_export.cache.replay import DenseAttention, attend_with_option, keeps_everything
from ssd_export.calibrate.sensitivity import causal, rope, sampled_logits, wide
from ssd_export.model.decoder import ImageTokenModel, Layer
from ssd_export.policy.table import HeadOption
from ssd_export.sampling import Sampling

ROWS = 8  # rows that go through the layers together


class Ablation:
    """Costs of one image by trying: the KL divergence that serving one head from an option
    causes.
    """

    def __init__(
        self, model: ImageTokenModel, last: Tensor, prompt_length: int, sampling: Sampling
    ) -> None:
        """Prepares one image's costs.

        Args: last: float32 [B, T, hidden] after the last layer, of the conditional row and, with
        guidance, the other.
        """
        self._model, self._prompt_length, self._sampling = model, prompt_length, sampling
        self._cos, self._sin = rope(model, last, prompt_length)
        self._head, self._norm = wide(model.generation_head), wide(model.language_model.norm)
        self._log_p = self._log_probabilities(last)[0]
        self._p = self._log_p.exp()

    @torch.no_grad()
    def layer(
        self, index: int, hidden: Tensor, options: Sequence[HeadOption], prompt_slots: int
    ) -> tuple[DenseAttention, Tensor]:
        """The layer's attention, and float64 [H, options]: KL per image token from the full cache,
        in nats.

        Args: hidden: float32 [B, T, hidden] before the layer.
        """
        seen: list[Tensor] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen.extend((query, key, value, causal(layer, query, key, value)))
            return seen[3]

        decoder_layer = wide(self._model.language_model.layers[index])
        assert isinstance(decoder_layer, Layer)
        decoder_layer.self_attn(decoder_layer.input_layernorm(hidden), self._cos, self._sin, attend)
        query, key, value, attended = seen
        grid = self._model.config.grid
        dense = DenseAttention.compute(query, key, value, self._prompt_length, grid)
        costs = torch.zeros(key.shape[1], len(options), dtype=torch.float64)
        for place, option in enumerate(options):
            if not keeps_everything(dense, option, prompt_slots):
                read = attend_with_option(dense, option, prompt_slots)  # [B, H, G, I, D]
                costs[:, place] = self._divergences(index, hidden, attended, read)
        return dense, costs

    def _divergences(self, index: int, hidden: Tensor, attended: Tensor, read: Tensor) -> Tensor:
        """KL divergence by KV head, [H], with its read [B, H, G, I, D] alone in the place of
        `attended` [B, Hq, T, D].
        """
        rows, num_heads, size = read.shape[:3]
        parts = []
        for heads in torch.arange(num_heads).split(max(1, ROWS // rows)):
            variants = attended[:, None].repeat(1, len(heads), 1, 1, 1)
            for place, head in enumerate(heads.tolist()):
                variants[:, place, head * size : (head + 1) * size, self._prompt_length :] = read[
                    :, head
                ]
            parts.append(self._divergence(index, hidden, variants))
        return torch.cat(parts)

    def _divergence(self, index: int, hidden: Tensor, variants: Tensor) -> Tensor:
        """[N] of variants [B, N, Hq, T, D]."""
        hidden = hidden[:, None].expand(-1, variants.shape[1], -1, -1).flatten(0, 1)
        variants = variants.flatten(0, 1)
        first, *later = self._model.language_model.layers[index:]
        hidden = wide(first)(hidden, self._cos, self._sin, lambda *_: variants)
        for layer in later:
            hidden = wide(layer)(hidden, self._cos, self._sin, causal)
        other = self._log_probabilities(hidden)
        return (
            (self._p * (self._log_p - other)).sum(dim=-1).double().mean(dim=-1).clamp(min=0).cpu()
        )

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """[N, image tokens, V] of what tokens are sampled from."""
        logits = self._head(self._norm(hidden[:, self._prompt_length - 1 :]))
        return sampled_logits(logits, self._sampling).log_softmax(dim=-1)
