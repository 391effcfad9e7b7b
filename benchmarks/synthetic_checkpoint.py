"""Writes a random checkpoint in the shape, layout and size of a published one, to measure with.

    python -m benchmarks.synthetic_checkpoint --shape janus-pro-7b --layout original
    --dtype fp16 OUT

Its images are noise; time, memory and bytes are those of the real model. Text head, control
tokens and a tokenizer with as many entries as the model has embeddings are there too; of the parts
that serve understanding only, none is. Weights stream to the files: whatever the shape, memory
stays below half a gigabyte. Each tensor is a stretch of one sequence of normal numbers, begun at a
place that its name gives, and scaled so that activations neither vanish nor overflow in fp16.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ssd_export.config import ModelConfig, VQConfig
from ssd_export.demo.classes import published_weights
from ssd_export.demo.tokenizer import SPECIAL_TOKENS
from ssd_export.dtypes import MODEL_DTYPES, of_torch
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import FAMILIES, PUBLISHED, llamagen
from ssd_export.model.image_decoder import ImageDecoder

PUBLISHED_LAYOUT = "published"
LAYOUTS = ("transformers", "original", PUBLISHED_LAYOUT)
SHARD_BYTES = 5_000_000_000
NOISE_LENGTH = (1 << 22) + 15  # odd: no row of a matrix starts where the row above did
GAINS = {
    "q_proj": 2.0,
    "k_proj": 2.0,
    "vision_head": 4.0,
}  # or every step would sample from a flat distribution
SMALL = replace(
    PUBLISHED["janus-pro-1b"],
    vocab_size=1024,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=512,
    codebook_size=512,
    vq=VQConfig(64, 32, (1, 2), 1),
)
SHAPES = {**PUBLISHED, "small": SMALL}
TO_ORIGINAL = [
    (re.compile(r"^language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^generation_embeddings\."), "gen_embed."),
    (re.compile(r"^generation_aligner\.fc1\."), "gen_aligner.layers.0."),
    (re.compile(r"^generation_aligner\.hidden_layers\.0\."), "gen_aligner.layers.2."),
    (re.compile(r"^generation_head\.proj_out\."), "gen_head.output_mlp_projector."),
    (re.compile(r"^generation_head\."), "gen_head."),
    (re.compile(r"\.mid\.block_1\."), ".mid.0."),
    (re.compile(r"\.mid\.attn_1\."), ".mid.1."),
    (re.compile(r"\.mid\.block_2\."), ".mid.2."),
    (re.compile(r"\.up\.(\d+)\.block\."), r".conv_blocks.\1.res."),
    (re.compile(r"\.decoder\.up\."), ".decoder.conv_blocks."),
    (re.compile(r"^vqmodel\."), "gen_vision_model."),
]
Shapes = dict[str, tuple[int, ...]]


class NoiseWriter:
    """Writes tensors of noise to files without making them."""

    def __init__(self, dtype: torch.dtype, layout: str, seed: int) -> None:
        self.dtype, self._seed = dtype, seed
        self._canonical_name = next(
            form.canonical_name
            for family in FAMILIES.values()
            for form in family.layouts
            if form.name == layout
        )
        self._noise = torch.randn(NOISE_LENGTH, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[tuple[float, float], memoryview] = {}

    def write(self, file: BinaryIO, stored_name: str, shape: tuple[int, ...]) -> None:
        """Writes one tensor of noise in blocks; its numbers depend on its name alone."""
        name = self._canonical_name(stored_name)  # so that both layouts hold the same numbers
        block = self._block(name, shape)
        left = torch.Size(shape).numel() * self.dtype.itemsize
        start = zlib.crc32(f"{self._seed} {name}".encode()) % NOISE_LENGTH * self.dtype.itemsize
        while left:
            part = block[start : start + left]
            file.write(part)
            left, start = left - len(part), 0

    def _block(self, name: str, shape: tuple[int, ...]) -> memoryview:
        """All the noise, scaled for this tensor, in its dtype."""
        mean, scale = _distribution(name, shape)
        if (mean, scale) not in self._scaled:
            block = (self._noise * scale + mean).to(self.dtype)
            self._scaled[mean, scale] = block.view(torch.uint8).numpy().data
        return self._scaled[mean, scale]


def write_checkpoint(
    out: Path, shape: str, layout: str, dtype: str, seed: int = 0, num_layers: int | None = None
) -> Path:
    """Writes the checkpoint into the folder `out`, which must be new or empty, and returns it."""
    config = SHAPES[shape] if num_layers is None else replace(SHAPES[shape], num_layers=num_layers)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: give a new folder")
    if (config.family == llamagen.NAME) != (layout == PUBLISHED_LAYOUT):
        raise SystemExit(
            f"{shape} has no layout {layout}: --layout {PUBLISHED_LAYOUT} is LlamaGen's"
        )
    noise = NoiseWriter(MODEL_DTYPES[dtype].torch, layout, seed)
    if layout == PUBLISHED_LAYOUT:
        _write_shards(out, _published_shapes(config), noise, "model", "safetensors")
        (out / "config.json").write_text(json.dumps(llamagen_config(config), indent=1) + "\n")
        return out
    shapes = {_stored_name(name, layout): size for name, size in stored_shapes(config).items()}
    if layout == "original":
        _write_shards(out, shapes, noise, "pytorch_model", "bin")
        values = original_config(config)
    else:
        _write_shards(out, shapes, noise, "model", "safetensors")
        values = transformers_config(config)
    (out / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    tokenizer(config.vocab_size).save(str(out / "tokenizer.json"))
    return out


def stored_shapes(config: ModelConfig) -> Shapes:
    """Canonical name -> shape of what is written: all that generation needs, and the text head."""
    with torch.device("meta"):
        modules = ImageTokenModel(config, text_embedding=True), ImageDecoder(config)
    shapes = {
        name: tuple(value.shape)
        for module in modules
        for name, value in module.state_dict().items()
    }
    return shapes | {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def _published_shapes(config: ModelConfig) -> Shapes:
    """LlamaGen's names -> shapes: q, k and v are one matrix."""
    with torch.device("meta"):
        modules = ImageTokenModel(config, text_embedding=True), ImageDecoder(config)
    state = {name: value for module in modules for name, value in module.state_dict().items()}
    return {name: tuple(value.shape) for name, value in published_weights(config, state).items()}


def llamagen_config(config: ModelConfig) -> dict[str, object]:
    """The config.json that a person writes beside LlamaGen's weights."""
    return {
        "model_type": llamagen.NAME,
        "n_head": config.num_heads,
        "image_size": config.image_width,
    }


def tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly vocab_size entries that encodes any text; Janus' control tokens
    come last.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {char: index for index, char in enumerate(alphabet)}, []
    for left, right in _merges(alphabet):
        if len(vocab) == vocab_size - len(SPECIAL_TOKENS):
            break
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    return made


def transformers_config(config: ModelConfig) -> dict[str, object]:
    """config.json in the form of deepseek-community/Janus-Pro-*."""
    vq = config.vq
    return {
        "model_type": "janus",
        "text_config": _llama_config(config),
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": config.image_width,
            "num_image_tokens": config.grid.num_tokens,
        },
        "vq_config": {
            "latent_channels": vq.latent_channels,
            "base_channels": vq.base_channels,
            "channel_multiplier": list(vq.channel_multipliers),
            "num_res_blocks": vq.num_res_blocks,
            "num_embeddings": config.codebook_size,
            "embed_dim": config.codebook_dim,
        },
    }


def original_config(config: ModelConfig) -> dict[str, object]:
    """config.json in the form of deepseek-ai/Janus-Pro-*: the 7B file leaves what Llama's defaults
    say to them.
    """
    llama = _llama_config(config)
    if config.hidden_size == 4096:
        llama = {
            name: llama[name]
            for name in ("max_position_embeddings", "num_hidden_layers", "vocab_size")
        }
    mlp = {"depth": 2, "n_embed": config.hidden_size, "projector_type": "mlp_gelu"}
    codes = {"image_token_size": config.codebook_size, "n_embed": config.codebook_dim}
    head = {"image_token_size": config.codebook_size, "n_embed": config.hidden_size}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": {"model_type": "llama", **llama},
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "params": {**mlp, "input_dim": config.codebook_dim},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "params": {**head, "image_token_embed": config.hidden_size},
        },
        "gen_vision_config": {"cls": "VQ-16", "params": codes},
    }


def _llama_config(config: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
    }


def _stored_name(name: str, layout: str) -> str:
    """A canonical name as the layout writes it: the other direction of
    Layout.canonical_name.
    """
    if layout == "transformers":
        return name if name.startswith("lm_head.") else f"model.{name}"
    for pattern, replacement in TO_ORIGINAL:
        name = pattern.sub(replacement, name)
    return name


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's numbers."""
    if len(shape) == 1:
        return (1.0, 0.1) if "norm" in name and name.endswith("weight") else (0.0, 0.1)
    if "embed" in name:
        return 0.0, 1.0
    return 0.0, GAINS.get(name.split(".")[-2], 1.0) / torch.Size(shape[1:]).numel() ** 0.5


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of bytes, then every pair and a third."""
    yield from ((left, right) for left in alphabet for right in alphabet)
    yield from (
        (first + second, third) for first in alphabet for second in alphabet for third in alphabet
    )


def _write_shards(out: Path, shapes: Shapes, noise: NoiseWriter, stem: str, suffix: str) -> None:
    """One file, or numbered ones of at most SHARD_BYTES and their index."""
    write = _write_safetensors if suffix == "safetensors" else _write_pickle
    size = noise.dtype.itemsize
    shards: list[Shapes] = [{}]
    written = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * size
        if written + num_bytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            written = 0
        shards[-1][name] = shape
        written += num_bytes
    if len(shards) == 1:
        write(out / f"{stem}.{suffix}", shapes, noise)
        return
    files = [
        f"{stem}-{index:05}-of-{len(shards):05}.{suffix}" for index in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        write(out / file, shard, noise)
    total = sum(torch.Size(shape).numel() * size for shape in shapes.values())
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_safetensors(path: Path, shapes: Shapes, noise: NoiseWriter) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * noise.dtype.itemsize
        kind = of_torch(noise.dtype).safetensors
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            noise.write(file, name, shape)


def _write_pickle(path: Path, shapes: Shapes, noise: NoiseWriter) -> None:
    """torch.save's zip file with room for every tensor, then the numbers: nothing is held in
    memory.

    Source: torch.serialization.skip_data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state: dict[str, Tensor] = {
            name: torch.empty(shape, dtype=noise.dtype) for name, shape in shapes.items()
        }
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    with FakeTensorMode():
        stored = torch.load(path, weights_only=True)
    with path.open("r+b") as file:
        for name, shape in shapes.items():
            file.seek(stored[name].untyped_storage()._checkpoint_offset)
            noise.write(file, name, shape)


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="janus-pro-1b")
    parser.add_argument("--layout", choices=LAYOUTS, default="transformers")
    parser.add_argument("--dtype", choices=sorted(MODEL_DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-layers", type=int, help="only the first layers of the shape")
    parser.add_argument("out", type=Path)
    spec = parser.parse_args()
    print(
        write_checkpoint(spec.out, spec.shape, spec.layout, spec.dtype, spec.seed, spec.num_layers)
    )


if __name__ == "__main__":
    main()
