"""Our modules against transformers' own Janus: greedy tokens 576 of 576, pixels bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration

from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import prompt_encoder
from ssd_export.model.families.janus import GRID
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.prompt import EncodedPrompts
from tests.janus_checkpoints import (
    TinyJanus,
    build_model,
    oracle_tokens,
    train_tokenizer,
    write_original_checkpoint,
    write_transformers_checkpoint,
)

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "two green triangles beside the yellow star on white", "x"]
ROUNDING = 1e-4
WRITERS = {"transformers": write_transformers_checkpoint, "original": write_original_checkpoint}
CASES = [
    # layout, sharded, cfg_scale, numbers
    ("transformers", False, 5.0, TinyJanus(seed=1)),
    ("original", False, 2.0, TinyJanus(num_layers=3, num_kv_heads=2, seed=2)),
    (
        "transformers",
        True,
        2.0,
        TinyJanus(num_kv_heads=2, head_dim=32, role_tokens_added=False, seed=3),
    ),
    (
        "original",
        True,
        5.0,
        TinyJanus(
            num_layers=4, num_heads=6, num_kv_heads=1, hidden_size=96, rope_theta=500.0, seed=4
        ),
    ),
]


class FullCache:
    """Attention over all that was attended before; the simplest thing that is right."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.mask = torch.empty(0)  # bool [B, 1, T, all tokens so far], set by the loop

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys[layer] = torch.cat([self.keys[layer], key], 2) if layer in self.keys else key
        self.values[layer] = (
            torch.cat([self.values[layer], value], 2) if layer in self.values else value
        )
        key, value = self.keys[layer], self.values[layer]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, enable_gqa=True
        )


def load(module: torch.nn.Module, checkpoint: Checkpoint) -> torch.nn.Module:
    module.load_state_dict(
        {name: checkpoint.tensor(name) for name in module.state_dict()}, strict=True
    )
    return module.eval()


@torch.no_grad()
def assert_pixels_equal(
    checkpoint: Checkpoint, oracle: JanusForConditionalGeneration, codes: Tensor
) -> None:
    pixels = load(ImageDecoder(checkpoint.config), checkpoint)(codes)
    assert pixels.shape[1:] == (3, checkpoint.config.image_height, checkpoint.config.image_width)
    assert torch.equal(pixels, oracle.model.vqmodel.decode(codes))


@torch.no_grad()
def generate(model: ImageTokenModel, encoded: EncodedPrompts, cfg_scale: float) -> Tensor:
    """Greedy tokens [N, 576] with a full cache."""
    ids, lengths = (
        torch.from_numpy(encoded.ids).long(),
        torch.from_numpy(encoded.prompt_length).long(),
    )
    rows, width = ids.shape
    cache, ahead = FullCache(), torch.arange(width)
    held = ahead < lengths[:, None]  # bool [B, tokens so far]
    cache.mask = (ahead <= ahead[:, None]) & held[:, None, None, :] | torch.eye(
        width, dtype=torch.bool
    )
    hidden = model(model.embed_text_tokens(ids), ahead.expand(rows, -1), cache)
    hidden = hidden[torch.arange(rows), lengths - 1]
    tokens = []
    for step in range(GRID.num_tokens):
        conditional, unconditional = model.image_logits(hidden).chunk(2)
        tokens.append((unconditional + cfg_scale * (conditional - unconditional)).argmax(-1))
        held = F.pad(held, (0, 1), value=True)
        cache.mask = held[:, None, None, :]
        embedded = model.embed_image_tokens(tokens[-1]).repeat(2, 1)[:, None]
        hidden = model(embedded, (lengths + step)[:, None], cache)[:, 0]
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize(
    "layout, sharded, cfg_scale, tiny", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_greedy_tokens_and_pixels_equal_transformers(
    layout: str, sharded: bool, cfg_scale: float, tiny: TinyJanus, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(WRITERS[layout](tmp_path, tiny, sharded=sharded))
    assert checkpoint.layout == layout
    oracle = (
        JanusForConditionalGeneration.from_pretrained(tmp_path)
        if layout == "transformers"
        else build_model(tiny)
    )
    expected, gap = oracle_tokens(
        oracle, train_tokenizer(tiny.role_tokens_added), PROMPTS, cfg_scale
    )
    assert gap > ROUNDING, (
        f"the greedy choice of this checkpoint is a matter of rounding ({gap}): take another seed"
    )
    assert all(len(set(row)) > 36 for row in expected.tolist())

    encoded = prompt_encoder(checkpoint.config, checkpoint.file).encode(PROMPTS, prompt_slots=64)
    tokens = generate(
        load(ImageTokenModel(checkpoint.config, text_embedding=True), checkpoint),
        encoded,
        cfg_scale,
    )
    assert torch.equal(tokens, expected)

    assert_pixels_equal(checkpoint, oracle, tokens)


def test_image_decoder_with_five_levels_equals_transformers(tmp_path: Path) -> None:
    """The real depth, 16 times the grid; the original layout tells it by the shapes of the tensors
    alone.
    """
    tiny = TinyJanus(channel_multipliers=(1, 1, 2, 2, 4))
    checkpoint = open_checkpoint(write_original_checkpoint(tmp_path, tiny))
    assert checkpoint.config.image_width == 384
    codes = torch.randint(
        0, tiny.codebook_size, (1, GRID.num_tokens), generator=torch.Generator().manual_seed(0)
    )
    assert_pixels_equal(checkpoint, build_model(tiny), codes)
