"""Inventory of a checkpoint: tensors that an export takes, leaves out, and must not miss.

A tensor that the language model, the generation modules or the image decoder would use and that the
family's models do not have (a bias, a norm of queries, LoRA beside its base, a layer too many)
would be left out without a word: it is refused by name. What generating images does not need is
listed.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.families.family import Family
from ssd_export.model.quantized_checkpoint import refuse_quantized_names

Shape = tuple[int, ...]
USED = (
    "language_model.",
    "generation_embeddings.",
    "generation_aligner.",
    "generation_head.",
    "caption_projection.",
    "vqmodel.post_quant_conv.",
    "vqmodel.decoder.",
    "vqmodel.quantize.",
)
LORA = re.compile(r"\.lora_[A-Za-z_]+(\.|$)|\.base_layer\.|^base_model\.")
FIRST_NORM = "language_model.layers.0.input_layernorm.weight"
LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
WRAPPERS = ("module.", "_orig_mod.", "model.model.", "base_model.model.")
SAME = "take config.json and weights from the same checkpoint"


def check_counts(
    path: Path, family: Family, config: ModelConfig, shapes: Mapping[str, Shape]
) -> None:
    """Raises UserError where config.json counts more than the files can hold.

    Building a model of what config.json says, even without memory, takes time for every layer; a
    count of 10**12 would never end.
    """
    largest = max((max(shape, default=1) for shape in shapes.values()), default=1)
    layers = len({found[1] for name in shapes if (found := LAYER.match(name))})
    if not layers:
        raise _missing(path, family, FIRST_NORM, 0, shapes)
    limits = {
        "num_hidden_layers": (config.num_layers, layers),
        "num_res_blocks": (config.vq.num_res_blocks, len(shapes)),
        "vocab_size": (config.vocab_size, largest),
        "hidden_size": (config.hidden_size, largest),
        "intermediate_size": (config.intermediate_size, largest),
        "num_attention_heads": (config.num_heads, largest),
        "head_dim": (config.head_dim, largest),
        "num_embeddings": (config.codebook_size, largest),
        "embed_dim": (config.codebook_dim, largest),
        "latent_channels": (config.vq.latent_channels, largest),
        "base_channels": (config.vq.base_channels, largest),
        "out_channels": (config.vq.out_channels, largest),
        "channel_multiplier": (max(config.vq.channel_multipliers), largest),
    }
    for name, (value, limit) in limits.items():
        if value > limit:
            raise UserError(
                f"{path / 'config.json'}: {name} is {reprlib.repr(value)}, and the weights beside"
                f" it have at most {limit}: {SAME}"
            )
    levels = len({name.split(".")[3] for name in shapes if name.startswith("vqmodel.decoder.up.")})
    if len(config.vq.channel_multipliers) > levels:
        raise UserError(
            f"{path} lacks levels of the image decoder: config.json's channel_multiplier has"
            f" {len(config.vq.channel_multipliers)}, the weights have {levels}: {SAME}"
        )


def check_inventory(
    path: Path,
    family: Family,
    expected: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, str],
) -> str:
    """One line on the tensors that are left out; "" where there are none.

    Args: expected: shapes by canonical name; shapes, stored: of the files, shape and stored name by
    canonical name.
    Raises: UserError for a tensor that is missing, has another shape, or would be used and is not
    expected.
    """
    others = [name for name in shapes if name not in expected]
    lora = next(
        (name for name in others if LORA.search(name) and not name.startswith(family.left_out)),
        None,
    )
    if lora is not None:
        raise UserError(
            f"{path}: {stored[lora]} is a LoRA tensor beside its base, which an export would leave"
            " out: merge it first (peft: merge_and_unload(), then save_pretrained())"
        )
    refuse_quantized_names(
        path, (stored[name] for name in others if not name.startswith(family.left_out))
    )
    _check_expected(path, family, expected, shapes, stored)
    for name in others:
        if name.startswith(USED) and not re.search(family.derived, name):
            raise _unexpected(path, family, name, expected, shapes, stored)
    kinds = Counter(_kind(name) for name in others)
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


def _check_expected(
    path: Path,
    family: Family,
    expected: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, str],
) -> None:
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise _missing(path, family, missing[0], len(missing) - 1, stored.values())
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"{path}: {name} has shape {list(shapes[name])}, expected {list(shape)}"
                f" (config.json): {SAME}"
            )


def _missing(path: Path, family: Family, name: str, more: int, stored: Iterable[str]) -> UserError:
    way_out = _wrapped(name, stored) or f"give a complete {family.title} checkpoint"
    others = f" and {more} more" if more else ""
    return UserError(f"{path} lacks the tensor {name}{others}: {way_out}")


def _wrapped(name: str, stored: Iterable[str]) -> str:
    """The way out where the tensor is there under the name of a wrapper (DDP, torch.compile)."""
    for other in stored:
        prefix = next((prefix for prefix in WRAPPERS if other.startswith(prefix)), None)
        if prefix and other.endswith(name):
            return f"it is there as {other}; save the weights without {prefix!r}"
    return ""


def _unexpected(
    path: Path,
    family: Family,
    name: str,
    expected: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, str],
) -> UserError:
    layers = {int(found[1]) for other in expected if (found := LAYER.match(other))}
    found = LAYER.match(name)
    if found and int(found[1]) not in layers:
        return UserError(
            f"{path} has weights of layer {found[1]} ({stored[name]}), and config.json has only"
            f" {len(layers)} layers: {SAME}"
        )
    return UserError(
        f"{path}: {stored[name]} {list(shapes[name])} would be used by the model and is none of"
        f" {family.title}'s, so an export would leave it out: give a {family.title} checkpoint"
    )


def _kind(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("vqmodel", "language_model") else parts[0]
