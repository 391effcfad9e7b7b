"""A Janus-Pro checkpoint directory behind one set of names, whichever layout it is stored in.

Canonical names are those of the transformers layout without the leading "model.":
    language_model.{embed_tokens,norm,layers.N.*}   generation_{embeddings,aligner,head}.*
    vqmodel.{quantize.embedding,post_quant_conv,decoder.*}
Everything else in the files (understanding, text head, image encoder) is ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.config_reader import ConfigFile, layout_of, read_model_config
from ssd_export.model.conversion import convert
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.prompt import PromptEncoder
from ssd_export.model.weight_files import WeightFile, open_weight_files, read_json

DAMAGED = "the file is damaged or the training diverged; download the checkpoint again"
EMBED_TOKENS = "language_model.embed_tokens.weight"
FROM_ORIGINAL = [
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^gen_embed\."), "generation_embeddings."),
    (re.compile(r"^gen_aligner\.layers\.0\."), "generation_aligner.fc1."),
    (re.compile(r"^gen_aligner\.layers\.2\."), "generation_aligner.hidden_layers.0."),
    (re.compile(r"^gen_head\.output_mlp_projector\."), "generation_head.proj_out."),
    (re.compile(r"^gen_head\."), "generation_head."),
    (re.compile(r"^gen_vision_model\."), "vqmodel."),
    (re.compile(r"^vqmodel\.decoder\.mid\.0\."), "vqmodel.decoder.mid.block_1."),
    (re.compile(r"^vqmodel\.decoder\.mid\.1\."), "vqmodel.decoder.mid.attn_1."),
    (re.compile(r"^vqmodel\.decoder\.mid\.2\."), "vqmodel.decoder.mid.block_2."),
    (re.compile(r"^vqmodel\.decoder\.conv_blocks\.(\d+)\.res\."), r"vqmodel.decoder.up.\1.block."),
    (re.compile(r"^vqmodel\.decoder\.conv_blocks\."), "vqmodel.decoder.up."),
]
PROJECTION = re.compile(r"language_model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight")


def canonical_name(stored: str, layout: str) -> str:
    """The canonical name of a stored tensor."""
    if layout == "transformers":
        return stored.removeprefix("model.")
    for pattern, replacement in FROM_ORIGINAL:
        stored = pattern.sub(replacement, stored)
    return stored


class Checkpoint:
    """A checked checkpoint; tensors are read one at a time, in the dtype they are stored in."""

    def __init__(
        self, path: Path, layout: str, config: ModelConfig, places: dict[str, _Place]
    ) -> None:
        self.path, self.layout, self.config = path, layout, config
        self.tokenizer_path = path / "tokenizer.json"
        self.num_layers_of_the_model = config.num_layers
        self._places = places

    def first_layers(self, num_layers: int) -> Checkpoint:
        """The checkpoint of a smaller model: its first layers, and all that is not in a layer."""
        config = first_layers(self.config, num_layers)
        places = {name: place for name, place in self._places.items() if _layer(name) < num_layers}
        smaller = Checkpoint(self.path, self.layout, config, places)
        smaller.num_layers_of_the_model = self.num_layers_of_the_model
        return smaller

    def names(self) -> list[str]:
        """Canonical names of all that is needed to draw images, in the order of the modules."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def stored_bytes(self, name: str) -> int:
        """Of the tensor as it is stored; two bytes a number where that is not known before it is
        read.
        """
        place = self._places[name]
        dtype = place.file.dtype(place.stored_name)
        return torch.Size(place.shape).numel() * (2 if dtype is None else dtype.itemsize)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, in dtype; without one as it is stored.

        Raises: UserError for NaN, infinity, values that dtype does not hold, a tensor that is not
        float.
        """
        tensor = self._places[name].read()
        if not tensor.dtype.is_floating_point or tensor.element_size() == 1:
            raise UserError(
                f"{self._where(name)} is {tensor.dtype}: give the unquantised float weights"
            )
        return convert(tensor, dtype or tensor.dtype, self._where(name), DAMAGED)

    def fingerprint(self) -> str:
        """sha256 of names, shapes, dtypes and samples of the content; equal for both layouts,
        cheap.
        """
        digest = hashlib.sha256()
        for name in sorted(self._places):
            sample = self._places[name].sample()
            digest.update(f"{name} {self.shape(name)} {sample.dtype}\n".encode())
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _where(self, name: str) -> str:
        place = self._places[name]
        return f"{place.file.path}: {place.stored_name}"


class ShapeOnly(Checkpoint):
    """A checkpoint that is not here: names and shapes for a plan, as if stored in two bytes a
    number.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Path(), "transformers", config, {})
        self._shapes = _expected(config)

    def first_layers(self, num_layers: int) -> ShapeOnly:
        return ShapeOnly(first_layers(self.config, num_layers))

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_bytes(self, name: str) -> int:
        return 2 * torch.Size(self.shape(name)).numel()

    def fingerprint(self) -> str:
        """Of no particular weights: every head map of this shape fits."""
        return ""


def first_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """Raises: UserError where the model has fewer."""
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(
            f"--num-layers {num_layers} is outside 1..{config.num_layers}, the layers of this model"
        )
    return replace(config, num_layers=num_layers)


def _layer(name: str) -> int:
    """The layer that a tensor belongs to, -1 for one outside the layers."""
    found = re.match(r"language_model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


class _Place:
    """Where a tensor is stored."""

    def __init__(self, file: WeightFile, stored_name: str) -> None:
        self.file, self.stored_name = file, stored_name
        self.shape = file.shapes[stored_name]

    def read(self) -> Tensor:
        return self.file.read(self.stored_name)

    def sample(self) -> Tensor:
        return self.file.sample(self.stored_name, num_runs=16, run_length=64)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint whose files, names, shapes and tokenizer have been checked; no weights are read
    yet.

    Args:
        path: directory with config.json, tokenizer.json and the weights, in the layout of
            deepseek-ai/Janus-Pro-* or of deepseek-community/Janus-Pro-*.
    Raises: UserError for whatever is missing, foreign, damaged or of a wrong shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"no checkpoint at {path}: give the directory that holds config.json and the weights"
        )
    file = ConfigFile(path / "config.json", read_json(path / "config.json"))
    layout = layout_of(file)
    places = {
        canonical_name(stored, layout): _Place(weights, stored)
        for weights in open_weight_files(path)
        for stored in weights.shapes
    }
    if (
        EMBED_TOKENS not in places and "lm_head.weight" in places
    ):  # tied weights are stored under one name only
        places[EMBED_TOKENS] = places["lm_head.weight"]
    config = read_model_config(file, {name: place.shape for name, place in places.items()})
    checkpoint = Checkpoint(path, layout, config, _needed(path, config, places))
    _check_tokenizer(checkpoint)
    return checkpoint


def permute_heads(
    name: str, tensor: Tensor, head_order: Sequence[Sequence[int]], config: ModelConfig
) -> Tensor:
    """The tensor with its KV heads, and the query heads that belong to them, in the order of its
    layer.

    The model computes the same: q, k and v deliver the heads in the new order, o takes them in the
    new order. Tensors other than q, k, v, o projections come back unchanged.

    Args:
        head_order: per layer, the original KV head at each new place.
    """
    match = PROJECTION.fullmatch(name)
    if not match:
        return tensor
    order = list(head_order[int(match[1])])
    if sorted(order) != list(range(config.num_kv_heads)):
        raise ValueError(
            f"head_order {order} of layer {match[1]} is no permutation of {config.num_kv_heads}"
            " heads"
        )
    axis = 1 if match[2] == "o" else 0
    heads = tensor.unflatten(
        axis, (config.num_kv_heads, -1)
    )  # the query heads of a KV head are neighbours
    return heads.index_select(axis, torch.tensor(order)).flatten(axis, axis + 1)


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all that is needed to draw, by canonical name, in the order of the modules."""
    with torch.device("meta"):
        modules = ImageTokenModel(config, text_embedding=True), ImageDecoder(config)
    return {
        name: tuple(value.shape)
        for module in modules
        for name, value in module.state_dict().items()
    }


def _needed(path: Path, config: ModelConfig, places: dict[str, _Place]) -> dict[str, _Place]:
    expected = _expected(config)
    missing = [name for name in expected if name not in places]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path} lacks the tensor {missing[0]}{more}: give a complete Janus-Pro checkpoint"
        )
    for name, shape in expected.items():
        if places[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(places[name].shape)}, expected {list(shape)}"
                " (config.json): take config.json and weights from the same checkpoint"
            )
    return {name: places[name] for name in expected}


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    encoder = PromptEncoder.from_file(checkpoint.tokenizer_path)
    if encoder.max_id >= checkpoint.config.vocab_size:
        raise UserError(
            f"{checkpoint.tokenizer_path} has ids up to {encoder.max_id}, the model has"
            f" {checkpoint.config.vocab_size} embeddings: take tokenizer.json from the same"
            " checkpoint"
        )
