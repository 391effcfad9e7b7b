"""The class-conditional demo model: a LlamaGen that generates the scenes of one color and kind.

A class is a number of equal shapes (one to four), their color, their kind and the ground; its name
is the caption of such a scene, so captions, checker and score are those of the other demo model.
While training a class's row of the table is the sum of a row for each of the four, so that classes
kept from training have rows, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssd_export.config import EMBED_TOKENS, ModelConfig
from ssd_export.demo import codes
from ssd_export.demo.scenes import COLORS, GROUNDS, KINDS, NUMBERS, SIZE, plural
from ssd_export.model.conversion import convert
from ssd_export.model.families import llamagen

COUNTS = (1, *NUMBERS)
QKV_PARTS = re.compile(r"\.[qkv]_proj\.weight$")
# From canonical to published names (model/families/llamagen.py has the other direction).
TO_PUBLISHED = (
    (EMBED_TOKENS, "cls_embedding.embedding_table.weight"),
    ("caption_projection.", "cls_embedding.cap_proj."),
    ("language_model.", ""),
    ("generation_embeddings.", "tok_embeddings."),
    ("generation_head.vision_head.", "output."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.o_proj.", "attention.wo."),
    ("mlp.gate_proj.", "feed_forward.w1."),
    ("mlp.down_proj.", "feed_forward.w2."),
    ("mlp.up_proj.", "feed_forward.w3."),
    ("vqmodel.", ""),
    ("decoder.mid.block_1.", "decoder.mid.0."),
    ("decoder.mid.attn_1.", "decoder.mid.1."),
    ("decoder.mid.block_2.", "decoder.mid.2."),
    ("decoder.up.", "decoder.conv_blocks."),
    (".block.", ".res."),
)
DIVERGED = "the training diverged; train with another --seed"


@lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """The caption of every class, by its number."""
    return tuple(_caption(*parts) for parts in product(COUNTS, COLORS, KINDS, GROUNDS))


def _caption(count: int, color: str, kind: str, ground: str) -> str:
    article = "an" if color == "orange" else "a"
    shapes = (
        f"{article} {color} {kind}" if count == 1 else f"{NUMBERS[count]} {color} {plural(kind)}"
    )
    return f"{shapes} on {ground}"


@lru_cache(maxsize=1)
def class_factors() -> tuple[np.ndarray, ...]:
    """Number, color, kind and ground of every row of the table, int64 [classes + 1] each; the last
    row, that of no class, shares its rows with no other.
    """
    sizes = tuple(map(len, (COUNTS, COLORS, KINDS, GROUNDS)))
    every = np.indices(sizes).reshape(len(sizes), -1)
    return tuple(np.append(own, size) for own, size in zip(every, sizes, strict=True))


class ClassIds:
    """The one id of a scene's class; dropped: that of no class."""

    def __init__(self) -> None:
        self._numbers = {name: number for number, name in enumerate(class_names())}

    def __call__(self, caption: str, dropped: bool) -> list[int]:
        """The row's ids of a caption that names a class."""
        return [len(self._numbers) if dropped else self._numbers[caption]]


def class_shares(done: float) -> tuple[float, float, float, float]:
    """Share of single, counting, two objects, relation after a part `done` of the training."""
    single = max(0.3, 0.8 - 2 * done)
    return (single, 1 - single, 0.0, 0.0)


def write_class_checkpoint(
    folder: Path,
    config: ModelConfig,
    model: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    generation: Mapping[str, float],
) -> None:
    """Writes config.json, ssd_generation.json and model.safetensors, fp16, under the published
    names.

    Args: model, decoder: as write_demo_checkpoint takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: convert(tensor, torch.float16, name, DIVERGED, chosen=False).contiguous()
        for name, tensor in published_weights(config, {**model, **decoder}).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = {
        "model_type": llamagen.NAME,
        "n_head": config.num_heads,
        "image_size": SIZE,
        "num_classes": len(class_names()),
        "class_names": class_names(),
    }
    for name, values in (("config.json", said), ("ssd_generation.json", generation)):
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def published_weights(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by LlamaGen's published names, of those by canonical ones: pairs of a head become
    neighbors, and q, k and v one matrix.
    """
    published = {}
    for name, tensor in state.items():
        stored = name
        for ours, theirs in TO_PUBLISHED:
            stored = stored.replace(ours, theirs)
        if QKV_PARTS.search(name) is None:
            published[stored] = tensor
    for layer in range(config.num_layers):
        root = f"language_model.layers.{layer}.self_attn"
        query, key, value = (state[f"{root}.{part}_proj.weight"] for part in "qkv")
        pairs = [_as_neighbors(tensor, config.head_dim) for tensor in (query, key)]
        published[f"layers.{layer}.attention.wqkv.weight"] = torch.cat([*pairs, value])
    return published


def _as_neighbors(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose pairs stand half a head apart, so that they are neighbors."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def class_demo_config(config: ModelConfig) -> ModelConfig:
    """The other demo model's shape as a LlamaGen."""
    return replace(
        config,
        vocab_size=len(class_names()) + 1,
        max_positions=1 + codes.GRID**2,
        rms_norm_eps=1e-5,
        family=llamagen.NAME,
        rope_axes=2,
        has_aligner=False,
    )
