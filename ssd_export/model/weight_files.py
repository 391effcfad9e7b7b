"""Weights of a checkpoint directory, tensor by tensor: safetensors or torch pickles, in one file or sharded.

Files are mapped, never read whole and never executed: pickles go through torch's weights-only loader.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_export.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
# mapped pages count as this process's memory until the mapping is dropped
REOPEN_AFTER_BYTES = 256 << 20


class _Mapping:
    """The tensors of one file as views of the mapped file."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            handle = safe_open(path, framework="pt", device="cpu")
            self.names = list(handle.keys())
            self.view: Callable[[str], Tensor] = handle.get_tensor
            self.shape: Callable[[str], tuple[int, ...]] = lambda name: tuple(
                handle.get_slice(name).get_shape()
            )
            return
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise UserError(
                f"{path} holds no tensors by name: give the checkpoint's original pytorch_model.bin"
            )
        self.names = [name for name, value in state.items() if isinstance(value, Tensor)]
        self.view = state.__getitem__
        self.shape = lambda name: tuple(state[name].shape)


class WeightFile:
    """One file of weights. `read` gives a tensor of its own memory, `sample` a few elements."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping = _map(path)
        self._bytes_read = 0
        self.shapes = {name: self._mapping.shape(name) for name in self._mapping.names}

    def read(self, name: str) -> Tensor:
        if self._bytes_read > REOPEN_AFTER_BYTES:
            self._mapping, self._bytes_read = _map(self.path), 0
        view = self._mapping.view(name)
        self._bytes_read += view.nbytes
        return view.clone(memory_format=torch.contiguous_format)

    def sample(self, name: str, num_runs: int, run_length: int) -> Tensor:
        """Up to num_runs evenly spaced runs of neighbours, flat; touches no other part of the file."""
        flat = self._mapping.view(name).reshape(-1)
        last = max(flat.numel() - run_length, 0)
        starts = sorted({last * i // (num_runs - 1) for i in range(num_runs)})
        return torch.cat([flat[start : start + run_length] for start in starts])


def open_weight_files(directory: Path) -> list[WeightFile]:
    """The files of a checkpoint directory; safetensors before pickles, an index before a single file.

    Raises: UserError for no file, a missing shard, a truncated file, a pickle that holds more than tensors.
    """
    for index in INDEXES:
        if (directory / index).is_file():
            return [WeightFile(_shard(directory, index, name)) for name in _shard_names(directory / index)]
    for single in SINGLES:
        if (directory / single).is_file():
            return [WeightFile(directory / single)]
    raise UserError(f"{directory} holds no weights: expected one of {', '.join(SINGLES + INDEXES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: UserError when it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: give the directory of a Janus-Pro checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({_one_line(error)}): download the checkpoint again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: download the checkpoint again")
    return value


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map: download the checkpoint again")
    return sorted(set(weight_map.values()))


def _shard(directory: Path, index: str, name: str) -> Path:
    if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
        raise UserError(f"{directory / index} names {name!r}, not a weight file beside it: download it again")
    if not (directory / name).is_file():
        raise UserError(f"{directory} lacks the shard {name} that {index} names: download it again")
    return directory / name


def _map(path: Path) -> _Mapping:
    try:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
        return _Mapping(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: its pickle holds more than tensors and could run code; "
            "use the weights from the official repository, or a safetensors file"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        if "mmap can only be used" in str(error):  # a plain pickle, or torch's format of before 1.6
            raise UserError(f"{path} is not in torch's zip format: save it again with torch.save") from None
        reason = _one_line(error)
        raise UserError(f"{path} is truncated or not a weight file ({reason}): download it again") from None


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
