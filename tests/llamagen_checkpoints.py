"""Small random LlamaGen checkpoints as published, and an oracle of their arithmetic in plain torch
that shares no code with the package: no cache, no shared rotation, pairs as they are stored.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_export.config import Grid, ModelConfig, VQConfig
from ssd_export.model.image_decoder import ImageDecoder

CAPTION_TOKENS = 12


@dataclass(frozen=True)
class TinyLlamaGen:
    """The numbers of a random checkpoint; equal numbers give equal weights."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    hidden_size: int = 64
    intermediate_size: int = 96
    codebook_size: int = 256
    side: int = 16
    num_classes: int = 10
    has_null: bool = True
    caption_dim: int = 0  # 0: classes
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def gpt_weights(tiny: TinyLlamaGen) -> dict[str, Tensor]:
    """The transformer's tensors by their published names; large, or every token would be one."""
    generator = torch.Generator().manual_seed(tiny.seed)

    def normal(*shape: int, std: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * (std or 1.4 * shape[-1] ** -0.5)

    hidden, inner = tiny.hidden_size, tiny.intermediate_size
    qkv = (tiny.num_heads + 2 * tiny.num_kv_heads) * tiny.head_dim
    weights = {
        "tok_embeddings.weight": normal(tiny.codebook_size, hidden, std=1.0),
        "norm.weight": 1 + 0.1 * normal(hidden, std=1.0),
        "output.weight": normal(tiny.codebook_size, hidden),
    }
    if tiny.caption_dim:
        weights |= {
            "cls_embedding.cap_proj.fc1.weight": normal(hidden, tiny.caption_dim),
            "cls_embedding.cap_proj.fc2.weight": normal(hidden, hidden, std=0.3),
            "cls_embedding.uncond_embedding": normal(CAPTION_TOKENS, tiny.caption_dim, std=1.0),
        }
    else:
        rows = tiny.num_classes + tiny.has_null
        weights["cls_embedding.embedding_table.weight"] = normal(rows, hidden, std=1.0)
    for layer in range(tiny.num_layers):
        weights |= {
            f"layers.{layer}.attention_norm.weight": 1 + 0.1 * normal(hidden, std=1.0),
            f"layers.{layer}.attention.wqkv.weight": normal(qkv, hidden),
            f"layers.{layer}.attention.wo.weight": normal(hidden, hidden),
            f"layers.{layer}.ffn_norm.weight": 1 + 0.1 * normal(hidden, std=1.0),
            f"layers.{layer}.feed_forward.w1.weight": normal(inner, hidden),
            f"layers.{layer}.feed_forward.w3.weight": normal(inner, hidden),
            f"layers.{layer}.feed_forward.w2.weight": normal(hidden, inner),
        }
    return weights


def vq_weights(tiny: TinyLlamaGen) -> dict[str, Tensor]:
    """The image tokenizer's tensors by their published names, the encoder's stood in for by one."""
    vq = VQConfig(
        latent_channels=32, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1
    )
    config = ModelConfig(
        vocab_size=1, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4,
        intermediate_size=8, rope_theta=1e4, rms_norm_eps=1e-5, max_positions=1,
        codebook_size=tiny.codebook_size, codebook_dim=8, vq=vq, family="llamagen",
        grid=Grid(tiny.side, tiny.side), rows_per_image=2,
    )  # fmt: skip
    torch.manual_seed(tiny.seed)
    state = ImageDecoder(config).state_dict()
    published = {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(8)}
    for name, tensor in state.items():
        own = name.removeprefix("vqmodel.")
        for ours, theirs in (
            ("mid.block_1", "mid.0"),
            ("mid.attn_1", "mid.1"),
            ("mid.block_2", "mid.2"),
        ):
            own = own.replace(f"decoder.{ours}.", f"decoder.{theirs}.")
        own = own.replace("decoder.up.", "decoder.conv_blocks.").replace(".block.", ".res.")
        published[own] = tensor.clone()
    return published


def write_llamagen_checkpoint(folder: Path, tiny: TinyLlamaGen, **config: object) -> Path:
    """Writes the two published files and the config.json beside them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "t2i_XL" if tiny.caption_dim else "c2i_B"
    torch.save({"model": gpt_weights(tiny), "steps": 3}, folder / f"{kind}_tiny.pt")
    torch.save({"model": vq_weights(tiny)}, folder / "vq_ds16_tiny.pt")
    said = {
        "model_type": "llamagen",
        "n_head": tiny.num_heads,
        "image_size": 2 * tiny.side,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(said))
    return folder


class Oracle:
    """LlamaGen's transformer, a whole sequence at a time."""

    def __init__(self, tiny: TinyLlamaGen) -> None:
        self.tiny, self.weights = tiny, gpt_weights(tiny)

    def class_condition(self, labels: list[int]) -> tuple[Tensor, Tensor]:
        """(embeddings [2N, 1, hidden], mask [2N, 1]), the null class last."""
        rows = [*labels, *([self.tiny.num_classes] * len(labels) if self.tiny.has_null else [])]
        table = self.weights["cls_embedding.embedding_table.weight"]
        return table[rows][:, None], torch.ones(len(rows), 1)

    def caption_condition(self, captions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same of captions [T, caption_dim], padded on the left to CAPTION_TOKENS."""
        null = self.weights["cls_embedding.uncond_embedding"]
        embeds = torch.zeros(len(captions), CAPTION_TOKENS, self.tiny.caption_dim)
        mask = torch.zeros(len(captions), CAPTION_TOKENS)
        for row, caption in enumerate(captions):
            embeds[row, CAPTION_TOKENS - len(caption) :] = caption
            mask[row, CAPTION_TOKENS - len(caption) :] = 1
        both = torch.cat([embeds, null.expand(len(captions), -1, -1)])
        inner = F.gelu(
            both @ self.weights["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh"
        )
        return inner @ self.weights["cls_embedding.cap_proj.fc2.weight"].T, mask.repeat(2, 1)

    def logits(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """[B, image tokens + 1, V] after the condition and tokens [B, image tokens]."""
        w, tiny = self.weights, self.tiny
        hidden = torch.cat([condition, w["tok_embeddings.weight"][tokens]], dim=1)
        place = condition.shape[1]
        total = hidden.shape[1]
        seen = torch.ones(total, total).tril().bool().repeat(len(hidden), 1, 1)
        seen[:, :, :place] &= mask[:, None].bool()
        seen |= torch.eye(total).bool()
        turns = self._turns(place, total)
        for layer in range(tiny.num_layers):
            at = f"layers.{layer}."
            normed = self._norm(hidden, w[at + "attention_norm.weight"])
            fused = normed @ w[at + "attention.wqkv.weight"].T
            sizes = [
                n * tiny.head_dim for n in (tiny.num_heads, tiny.num_kv_heads, tiny.num_kv_heads)
            ]
            q, k, v = (
                part.unflatten(-1, (-1, tiny.head_dim)).transpose(1, 2)
                for part in fused.split(sizes, -1)
            )
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns
                ).flatten(-2)
                for x in (q, k)
            )
            group = tiny.num_heads // tiny.num_kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = q @ k.transpose(2, 3) / math.sqrt(tiny.head_dim)
            read = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
            hidden = hidden + read.transpose(1, 2).flatten(2) @ w[at + "attention.wo.weight"].T
            normed = self._norm(hidden, w[at + "ffn_norm.weight"])
            gate = F.silu(normed @ w[at + "feed_forward.w1.weight"].T)
            hidden = (
                hidden
                + (gate * (normed @ w[at + "feed_forward.w3.weight"].T))
                @ w[at + "feed_forward.w2.weight"].T
            )
        out = self._norm(hidden, w["norm.weight"]) @ w["output.weight"].T
        return out[:, place - 1 :]

    def greedy(self, condition: Tensor, mask: Tensor, cfg_scale: float, count: int) -> Tensor:
        """The first tokens [N, count], each row of the grid after another."""
        guided = len(condition) > 1 and self.tiny.has_null
        num_images = len(condition) // 2 if guided else len(condition)
        tokens = torch.zeros(num_images, 0, dtype=torch.long)
        for _ in range(count):
            rows = tokens.repeat(2, 1) if guided else tokens
            logits = self.logits(condition, mask, rows)[:, -1]
            if guided:
                one, other = logits.chunk(2)
                logits = other + (one - other) * cfg_scale
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        return tokens

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    def _turns(self, place: int, total: int) -> Tensor:
        """Complex [total, D/2]: e^(i angle) of an image token, 0 of the condition."""
        quarter, side = self.tiny.head_dim // 4, self.tiny.side
        steps = 10000.0 ** (-torch.arange(quarter) * 2 / (2 * quarter))
        turns = torch.zeros(total, 2 * quarter, dtype=torch.complex64)
        for index in range(total - place):
            row, column = divmod(index, side)
            angles = torch.cat([row * steps, column * steps])
            turns[place + index] = torch.polar(torch.ones_like(angles), angles)
        return turns
