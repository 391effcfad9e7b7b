"""Writes the trained demo model as a checkpoint in the transformers layout, fp16.

`JanusForConditionalGeneration.from_pretrained` loads it and generates the same tokens; what it
lacks (image encoder, understanding) is not used for generation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ssd_export.config import ModelConfig
from ssd_export.model.conversion import convert
from ssd_export.model.families.janus import BEGIN_OF_IMAGE, BOS, PAD

DIVERGED = "the training diverged; train with another --seed"
EOS, IMAGE = "<｜end▁of▁sentence｜>", "<image_placeholder>"


def write_demo_checkpoint(
    folder: Path,
    config: ModelConfig,
    model: dict[str, Tensor],
    decoder: dict[str, Tensor],
    tokenizer: Tokenizer,
    generation: dict[str, float],
) -> None:
    """Writes config.json, generation_config.json, ssd_generation.json, tokenizer.json and
    model.safetensors.

    Args: model, decoder: state dicts of ImageTokenModel(text_embedding=True) and ImageDecoder;
    generation: cfg_scale and temperature that a bundle of this model takes by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": convert(tensor, torch.float16, name, DIVERGED, chosen=False).contiguous()
        for name, tensor in {**model, **decoder}.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {
        name: tokenizer.token_to_id(token)
        for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    special = {f"{name}_token_id": number for name, number in ids.items()}
    _write_json(folder / "config.json", _janus_config(config, tokenizer, special))
    _write_json(
        folder / "generation_config.json",
        {
            **special,
            "generation_kwargs": {"boi_token_id": tokenizer.token_to_id(BEGIN_OF_IMAGE)},
            "guidance_scale": generation["cfg_scale"],
        },
    )
    _write_json(folder / "ssd_generation.json", generation)


def _janus_config(
    config: ModelConfig, tokenizer: Tokenizer, special: dict[str, int | None]
) -> dict[str, object]:
    """The fields that transformers' JanusConfig needs; the vision tower is a stub of one small
    layer.
    """
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": "float16",
        "image_token_id": tokenizer.token_to_id(IMAGE),
        "text_config": {
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            **special,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": 48,
            "patch_size": 2,
            "num_image_tokens": config.grid.num_tokens,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": config.hidden_size,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": config.codebook_dim,
            "num_embeddings": config.codebook_size,
            "base_channels": config.vq.base_channels,
            "latent_channels": config.vq.latent_channels,
            "num_res_blocks": config.vq.num_res_blocks,
            "channel_multiplier": list(config.vq.channel_multipliers),
            "projection_dim": config.hidden_size,
            "image_token_embed_dim": config.hidden_size,
        },
    }


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
