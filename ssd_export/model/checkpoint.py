"""A checkpoint directory behind one set of names, whichever family and layout it is of: those of
the modules in decoder.py and image_decoder.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.conversion import convert
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.families import assumed_head_map, family_of, identify, prompt_encoder
from ssd_export.model.families.family import Family, Layout, Part, names_of
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.inventory import check_counts, check_inventory
from ssd_export.model.lora import LoraMatrix, open_lora
from ssd_export.model.quantized_checkpoint import refuse_quantized_config
from ssd_export.model.uninitialized import shapes_alone
from ssd_export.model.weight_files import WeightFile, open_weight_files, read_json, sample_of
from ssd_export.os_errors import is_file, is_folder
from ssd_export.policy.head_map import HeadMap, find_head_map

NUM_RUNS, RUN_LENGTH = 16, 64  # of a tensor's numbers in the fingerprint
LORA_BYTES = 8  # of each number that an adapter adds, beside the tensor: product and its scaling
DAMAGED = "the file is damaged or the training diverged; download the checkpoint again"
PROJECTION = re.compile(r"language_model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight")


class Checkpoint:
    """A checked checkpoint; tensors are read one at a time, in the dtype they are stored in.

    layout: its name, among those of the family.
    """

    def __init__(
        self, path: Path, layout: str, config: ModelConfig, places: dict[str, _Place]
    ) -> None:
        self.path, self.layout, self.config = path, layout, config
        self.num_layers_of_the_model = config.num_layers
        self.left_out = ""  # kinds of tensors in the files that generating images does not need
        self._places = places

    def first_layers(self, num_layers: int) -> Checkpoint:
        """The checkpoint of a smaller model: its first layers, and all that is not in a layer."""
        config = first_layers(self.config, num_layers)
        places = {name: place for name, place in self._places.items() if _layer(name) < num_layers}
        smaller = Checkpoint(self.path, self.layout, config, places)
        smaller.num_layers_of_the_model = self.num_layers_of_the_model
        return smaller

    def file(self, name: str) -> Path:
        """A file beside the weights."""
        return self.path / name

    def head_map(self, explicit: str | Path | None = None) -> HeadMap | None:
        """The map asked for, else the checkpoint's own, else a built-in one that may be assumed.

        Args: explicit: as policy/head_map.py's find_head_map takes it.
        Raises: UserError for a map that is damaged, missing or another model's.
        """
        assumed = assumed_head_map(self.config, names_of(self.path))
        return find_head_map(self.config, explicit, self.fingerprint(), self.path, assumed)

    def names(self) -> list[str]:
        """Canonical names of all that generation needs, in the order of the modules."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, by its canonical name."""
        return self._places[name].shape

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor as it is stored; two a number where its dtype is not known before it
        is read.
        """
        place = self._places[name]
        dtype, size = place.file.dtype(place.stored_name), torch.Size(place.shape).numel()
        added = 0 if place.lora is None else LORA_BYTES * size
        return size * (2 if dtype is None else dtype.itemsize) + added

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the tensor, in dtype; without one as it is stored.

        Raises: UserError for NaN, infinity, values that dtype does not hold.
        """
        tensor = self._places[name].read()
        return convert(tensor, dtype or tensor.dtype, self._where(name), DAMAGED)

    def check_dtypes(self) -> None:
        """Raises UserError for a tensor that is not float, or has less than two bytes a number."""
        for name, place in self._places.items():
            dtype = place.file.dtype(place.stored_name)
            if dtype is None or not dtype.is_floating_point or dtype.itemsize == 1:
                kind = place.file.dtype_name(place.stored_name)
                raise UserError(
                    f"{self._where(name)} is {kind}: give the unquantized float weights"
                )

    def fingerprint(self) -> str:
        """sha256 of names, shapes and samples of the content, cheap; equal for both layouts and for
        every dtype that holds the same numbers.
        """
        digest = hashlib.sha256()
        for name in sorted(self._places):
            digest.update(f"{name} {self.shape(name)}\n".encode())
            digest.update(self._places[name].sample().to(torch.float32).numpy().tobytes())
        return digest.hexdigest()

    def _where(self, name: str) -> str:
        place = self._places[name]
        return f"{place.file.path}: {place.stored_name}"


class ShapeOnly(Checkpoint):
    """A checkpoint that is not here: names and shapes for a plan, as if stored in two bytes a
    number.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Path(), family_of(config).layouts[0].name, config, {})
        self._shapes = _expected(config)

    def first_layers(self, num_layers: int) -> ShapeOnly:
        """The shape of a model with only its first layers. Raises: UserError where it has fewer."""
        return ShapeOnly(first_layers(self.config, num_layers))

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, by its canonical name."""
        return self._shapes[name]

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor at two a number."""
        return 2 * torch.Size(self.shape(name)).numel()

    def fingerprint(self) -> str:
        """The empty fingerprint: every head map of this shape fits."""
        return ""

    def head_map(self, explicit: str | Path | None = None) -> HeadMap | None:
        """The map of a checkpoint that brings none."""
        assumed = assumed_head_map(self.config, ())
        return find_head_map(self.config, explicit, assumed=assumed)


def first_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The config of the model's first layers. Raises: UserError where it has fewer."""
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
    """Place of a tensor in the files."""

    def __init__(self, file: WeightFile, stored_name: str, part: Part | None = None) -> None:
        self.file, self.stored_name, self._part = file, stored_name, part
        self.lora: LoraMatrix | None = None  # what is added to the stored matrix
        whole = file.shapes[stored_name]
        self.shape = whole if part is None else (len(part.rows), *whole[1:])

    def part(self, part: Part) -> _Place:
        """Some of the rows."""
        place = _Place(self.file, self.stored_name, part)
        place.lora = self.lora
        return place

    def read(self) -> Tensor:
        rows = self._rows()
        if self._part is None or not self._part.pairs_of:
            return rows
        pairs = rows.unflatten(0, (-1, self._part.pairs_of // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    def _rows(self) -> Tensor:
        """The rows as stored, with what an adapter adds."""
        if self._part is None:
            rows = self.file.read(self.stored_name)
        else:
            rows = self.file.run(self.stored_name, *self._elements()).reshape(self.shape)
        if self.lora is None:
            return rows
        delta = self.lora.delta()
        return rows.add_(delta if self._part is None else delta[list(self._part.rows)])

    def sample(self) -> Tensor:
        if self.lora is None:
            return self.file.sample(self.stored_name, NUM_RUNS, RUN_LENGTH, *self._elements())
        return sample_of(self._rows().flatten(), NUM_RUNS, RUN_LENGTH)

    def _elements(self) -> tuple[int, int]:
        """First and last but one of the flat tensor."""
        size = torch.Size(self.shape).numel()
        first = 0 if self._part is None else self._part.rows.start * (size // len(self._part.rows))
        return first, first + size


def open_checkpoint(
    path: str | Path, lora: str | Path | None = None, prompt_template: str | None = None
) -> Checkpoint:
    """A checkpoint whose files, names, shapes and tokenizer have been checked; no weights are read
    yet.

    Args:
        path: directory with config.json, the prompt files of its family and the weights, in one of
            the family's layouts.
        lora: directory of an adapter (PEFT) that is added to its matrices as they are read.
        prompt_template: a name among the family's; None takes the one that the files tell.
    Raises: UserError for whatever is missing, foreign, damaged, quantized already, of a wrong
    shape,
        or would be used and has no place in a model of the family.
    """
    path = Path(path)
    if not is_folder(path):
        raise UserError(
            f"no checkpoint at {path}: give the directory that holds config.json and the weights"
        )
    file = ConfigFile(path / "config.json", read_json(path / "config.json"))
    refuse_quantized_config(path, file.values)
    family, layout = identify(file)
    if is_file(path / "adapter_config.json"):
        raise UserError(
            f"{path} holds a LoRA adapter beside its base, which an export would leave out: move"
            " adapter_config.json and adapter_model.safetensors to a folder and give it as --lora"
        )
    places = _places(path, layout)
    for name, other in family.stand_ins(file).items():
        if name not in places and other in places:
            places[name] = places[other]
    shapes = {name: place.shape for name, place in places.items()}
    if lora is not None:
        added = open_lora(Path(lora), layout.canonical_name, shapes, family.left_out)
        for name, matrix in added.items():
            places[name].lora = matrix
    config = _with_template(family, layout.read_config(file, shapes), prompt_template)
    places = _with_parts(places, layout.parts(config, shapes))
    shapes = {name: place.shape for name, place in places.items()}
    check_counts(path, family, config, shapes)
    expected = _expected(config)
    stored = {name: place.stored_name for name, place in places.items()}
    left_out = check_inventory(path, family, expected, shapes, stored)
    checkpoint = Checkpoint(path, layout.name, config, {name: places[name] for name in expected})
    checkpoint.left_out = left_out
    checkpoint.check_dtypes()
    prompt_encoder(config, checkpoint.file)
    return checkpoint


def _places(path: Path, layout: Layout) -> dict[str, _Place]:
    """Place of each tensor by canonical name. Raises: UserError for one that is there twice."""
    places: dict[str, _Place] = {}
    for weights in open_weight_files(path):
        for stored in weights.shapes:
            name = layout.canonical_name(stored)
            if name in places:
                first = places[name]
                raise UserError(
                    f"{path} holds {name} twice, as {first.stored_name} in {first.file.path.name}"
                    f" and as {stored} in {weights.path.name}: delete the one that is not meant"
                )
            places[name] = _Place(weights, stored)
    return places


def _with_template(family: Family, config: ModelConfig, name: str | None) -> ModelConfig:
    """The config with a prompt template. Raises: UserError for one that the family lacks."""
    if name is None:
        return config
    if name not in family.prompt_templates:
        known = " or ".join(family.prompt_templates)
        way_out = f"use {known}" if known else "leave it out"
        raise UserError(f"--prompt-template {name}: {family.title} has no such name; {way_out}")
    return replace(config, prompt_template=name)


def _with_parts(places: dict[str, _Place], parts: Mapping[str, Part]) -> dict[str, _Place]:
    """The places with parts in the place of the matrices that hold them."""
    replaced = {part.source for part in parts.values()}
    kept = {name: place for name, place in places.items() if name not in replaced}
    return kept | {name: places[part.source].part(part) for name, part in parts.items()}


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
    )  # the query heads of a KV head are neighbors
    return heads.index_select(axis, torch.tensor(order)).flatten(axis, axis + 1)


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all that generation needs, by canonical name, in the order of the modules."""
    with shapes_alone():
        modules = ImageTokenModel(config, text_embedding=True), ImageDecoder(config)
    return {
        name: tuple(value.shape)
        for module in modules
        for name, value in module.state_dict().items()
    }
