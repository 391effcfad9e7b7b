"""config.json of both checkpoint layouts -> ModelConfig, with the defaults that apply where it is
silent.

The original 7B file names only layers, positions and vocabulary: the rest is Llama's defaults. The
original layout says nothing about the image decoder's widths either; they are read from the
tensors' shapes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_export.config import ModelConfig, VQConfig
from ssd_export.errors import UserError
from ssd_export.model.families import janus
from ssd_export.model.image_decoder import NUM_GROUPS
from ssd_export.model.rope import rope_theta

LAYOUTS = {"janus": "transformers", "multi_modality": "original"}  # by config.json's model_type
Shapes = Mapping[str, tuple[int, ...]]  # canonical name -> shape


class ConfigFile:
    """One object of config.json, read with checks; every message names the file and the field."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def section(self, name: str) -> ConfigFile:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return ConfigFile(self.path, value or {}, f"{self.prefix}{name}.")

    def count(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(name, value, "a positive number")
        return float(value)

    def counts(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._get(name, default)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or any(type(v) is not int or v < 1 for v in value)
        ):
            raise self.wrong(name, value, "a list of positive integers")
        return tuple(value)

    def require(self, name: str, default: Any, *supported: Any) -> None:
        """Nothing when the field has a supported value. Raises: UserError otherwise."""
        value = self._get(name, default)
        if value not in supported:
            raise self.wrong(name, value, " or ".join(repr(v) for v in supported))

    def wrong(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(
            f"{self.path}: {self.prefix}{name} is {_shown(value)}, expected {expected}: "
            "give a Janus-Pro checkpoint with its own config.json"
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def _shown(value: Any) -> str:
    """A foreign value in a message: cut to one short line, whatever its size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def may_be_tied(file: ConfigFile) -> bool:
    """Whether the text head may stand for the text embedding: the file does not say that they
    differ; what it says of the whole model goes before what it says of the language model.
    """
    sections = [file, file.section("text_config"), file.section("language_config")]
    said = [section.values.get("tie_word_embeddings") for section in sections]
    return next((tied for tied in said if tied is not None), True) is not False


def layout_of(file: ConfigFile) -> str:
    """ "original" or "transformers". Raises: UserError for any other kind of model."""
    kind = file.values.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(
            f"{file.path}: model_type is {_shown(kind)}, not a Janus-Pro checkpoint (expected"
            f" {' or '.join(map(repr, LAYOUTS))}): give one, for example deepseek-ai/Janus-Pro-1B"
        )
    if LAYOUTS[kind] == "original" and "gen_vision_config" not in file.values:
        raise UserError(
            f"{file.path} has no gen_vision_config, so it draws no images: give a Janus-Pro"
            " checkpoint"
        )
    return LAYOUTS[kind]


def read_model_config(file: ConfigFile, shapes: Shapes) -> ModelConfig:
    """The checkpoint's ModelConfig.

    Raises: UserError for a field of a wrong type, a feature that Janus-Pro lacks, numbers that do
    not fit.
    """
    config = (
        _transformers_config(file)
        if layout_of(file) == "transformers"
        else _original_config(file, shapes)
    )
    widths = [config.vq.base_channels * multiplier for multiplier in config.vq.channel_multipliers]
    if any(width % NUM_GROUPS for width in widths):
        raise UserError(
            f"{file.path.parent}: the image decoder's widths {widths} are not multiples of"
            f" {NUM_GROUPS}: give a Janus-Pro checkpoint"
        )
    return config


def _transformers_config(file: ConfigFile) -> ModelConfig:
    vision, vq = file.section("vision_config"), file.section("vq_config")
    vision.require("num_image_tokens", janus.GRID.num_tokens, janus.GRID.num_tokens)
    vq.require("num_hidden_layers", 2, 2)
    vq.require("hidden_act", "gelu", "gelu")
    vq_config = VQConfig(
        latent_channels=vq.count("latent_channels", 256),
        base_channels=vq.count("base_channels", 128),
        channel_multipliers=vq.counts("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=vq.count("num_res_blocks", 2),
        out_channels=vq.count("out_channels", 3),
    )
    codebook = vq.count("num_embeddings", 16384), vq.count("embed_dim", 8)
    return _model_config(file.section("text_config"), codebook, vq_config)


def _original_config(file: ConfigFile, shapes: Shapes) -> ModelConfig:
    aligner = file.section("gen_aligner_config").section("params")
    aligner.require("depth", 2, 2)
    aligner.require("projector_type", "mlp_gelu", "mlp_gelu")
    vision = file.section("gen_vision_config").section("params")
    codebook = vision.count("image_token_size", 16384), vision.count("n_embed", 8)
    return _model_config(
        file.section("language_config"), codebook, _vq_config_from_shapes(file.path, shapes)
    )


def _model_config(text: ConfigFile, codebook: tuple[int, int], vq: VQConfig) -> ModelConfig:
    text.require("hidden_act", "silu", "silu")
    text.require("attention_bias", False, False)
    text.require("mlp_bias", False, False)
    hidden_size, num_heads = text.count("hidden_size", 4096), text.count("num_attention_heads", 32)
    num_kv_heads = text.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise text.wrong(
            "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads {num_heads}"
        )
    if text.values.get("head_dim") is None and hidden_size % num_heads:
        raise text.wrong(
            "num_attention_heads", num_heads, f"a divisor of hidden_size {hidden_size}"
        )
    head_dim = text.count("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise text.wrong("head_dim", head_dim, "an even number, RoPE turns pairs")
    return ModelConfig(
        vocab_size=text.count("vocab_size", 32000),
        hidden_size=hidden_size,
        num_layers=text.count("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.count("intermediate_size", 11008),
        rope_theta=rope_theta(text),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_positions=text.count("max_position_embeddings", 2048),
        codebook_size=codebook[0],
        codebook_dim=codebook[1],
        vq=vq,
        family=janus.NAME,
        grid=janus.GRID,
        rows_per_image=janus.ROWS_PER_IMAGE,
    )


def _vq_config_from_shapes(path: Path, shapes: Shapes) -> VQConfig:
    try:
        levels, blocks = 0, 0
        while f"vqmodel.decoder.up.{levels}.block.0.conv1.weight" in shapes:
            levels += 1
        while f"vqmodel.decoder.up.0.block.{blocks}.conv1.weight" in shapes:
            blocks += 1
        widths = [
            shapes[f"vqmodel.decoder.up.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ]
        return VQConfig(
            latent_channels=shapes["vqmodel.post_quant_conv.weight"][0],
            base_channels=widths[-1],
            channel_multipliers=tuple(max(width // widths[-1], 1) for width in reversed(widths)),
            num_res_blocks=blocks - 1,
            out_channels=shapes["vqmodel.decoder.conv_out.weight"][0],
        )
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{path.parent} lacks the image decoder (gen_vision_model, {error}): give a Janus-Pro"
            " checkpoint"
        ) from None
