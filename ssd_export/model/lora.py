"""A LoRA adapter in PEFT's form (adapter_config.json, adapter_model.safetensors), added to a
checkpoint's matrices one at a time.

W + scaling B A, with PEFT's own roundings, so that the result is that of merge_and_unload().
Source: peft, tuners/lora/layer.py (get_delta_weight).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssd_export.errors import UserError
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.conversion import check_finite
from ssd_export.model.weight_files import WeightFile, read_json
from ssd_export.os_errors import is_file, is_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Where the adapted model stands in the one that was saved.
PREFIXES = ("base_model.model.", "base_model.")
MERGE = "merge it with peft (merge_and_unload(), then save_pretrained()) and give that folder"
OTHER = "give the adapter of this model, or the model that the adapter was trained on"
FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# What changes the product, and the value that leaves it as it is.
PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


@dataclass(frozen=True)
class LoraMatrix:
    """The addition to a matrix [out, in]. down: [rank, in]; up: [out, rank]; both read when they
    are needed.
    """

    down: Callable[[], Tensor]
    up: Callable[[], Tensor]
    scaling: float

    def delta(self) -> Tensor:
        """scaling B A in the adapter's dtype."""
        up, down = self.up(), self.down()
        return ((up.float() @ down.float()) * self.scaling).to(up.dtype)


def open_lora(
    folder: Path,
    canonical_name: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    left_out: Collection[str],
) -> dict[str, LoraMatrix]:
    """Opens an adapter: its additions by the canonical name of the matrix.

    Args: canonical_name: of a stored name; shapes: of the checkpoint, by canonical name; left_out:
    beginnings of canonical names that generating does not need.
    Raises: UserError for what is no plain LoRA, an adapter of another model, modules that this
    model lacks, and numbers that are not finite.
    """
    if not is_folder(folder):
        raise UserError(f"no adapter at {folder}: give the folder that holds {CONFIG}")
    file = ConfigFile(folder / CONFIG, read_json(folder / CONFIG))
    for name, plain in PLAIN.items():
        value = file.values.get(name, plain)
        if value != plain and value not in (None, [], {}):
            raise UserError(f"{file.path}: {name} is {str(value)[:60]!r}, no plain LoRA: {MERGE}")
    if not is_file(folder / WEIGHTS):
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapter with save_pretrained()")
    weights = WeightFile(folder / WEIGHTS)
    pairs: dict[str, dict[str, str]] = {}
    for stored in weights.shapes:
        found = FACTOR.fullmatch(stored)
        if not found:
            raise UserError(f"{weights.path}: {stored[:80]} is no factor of a LoRA: {MERGE}")
        pairs.setdefault(found[1], {})[found[2]] = stored
    alpha, is_rs = file.number("lora_alpha", 8.0), file.values.get("use_rslora") is True
    matrices = {}
    for module, pair in pairs.items():
        name = _target(weights.path, module, canonical_name, shapes)
        _check_pair(weights, module, pair, shapes[name])
        rank = weights.shapes[pair["A"]][0]
        scaling = alpha / (rank**0.5 if is_rs else rank)
        if not name.startswith(tuple(left_out)):
            down, up = (_reader(weights, pair[factor]) for factor in "AB")
            matrices[name] = LoraMatrix(down, up, scaling)
    if not matrices:
        raise UserError(f"{folder} adapts nothing that generating images needs: {OTHER}")
    return matrices


def _target(
    path: Path,
    module: str,
    canonical_name: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
) -> str:
    """The canonical name of the matrix that a module's factors belong to."""
    prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), "")
    stored = f"{module.removeprefix(prefix)}.weight"
    # A language model that was adapted by itself does not know where it stands.
    for name in (canonical_name(stored), canonical_name(f"language_model.{stored}")):
        if name in shapes:
            return name
    raise UserError(f"{path}: {module[:80]} is no module of this model: {OTHER}")


def _check_pair(
    weights: WeightFile, module: str, pair: Mapping[str, str], shape: tuple[int, ...]
) -> None:
    if pair.keys() != {"A", "B"}:
        raise UserError(f"{weights.path}: {module[:80]} has one factor of two: save it again")
    down, up = (weights.shapes[pair[factor]] for factor in "AB")
    fits = len(shape) == len(down) == len(up) == 2 and down[0] == up[1] > 0
    if not fits or (up[0], down[1]) != shape:
        raise UserError(
            f"{weights.path}: {module[:80]} adds {list(up)} x {list(down)} to a matrix of"
            f" {list(shape)}: {OTHER}"
        )


def _reader(weights: WeightFile, stored: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = weights.read(stored)
        check_finite(tensor, f"{weights.path}: {stored}", "train the adapter again")
        return tensor

    read()  # what is wrong is said before anything is written
    return read
