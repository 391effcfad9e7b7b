"""Weights of a checkpoint directory, tensor by tensor: safetensors or torch pickles, in one file or
sharded.

A tensor at a time is read, never a whole file, and nothing is executed: pickles go through torch's
weights-only loader, mapped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_export.dtypes import BY_SAFETENSORS
from ssd_export.errors import UserError, first_line
from ssd_export.files import open_regular, read_file
from ssd_export.model.pickled_weights import SHOWN, PickledWeights, damaged
from ssd_export.os_errors import is_file, os_error

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
MAX_JSON_BYTES = 64 << 20  # config.json, an index: those of 7B models have some hundred kilobytes
LFS_POINTER = b"version https://git-lfs"


class _Safetensors:
    """The tensors of a safetensors file, read by their place: a mapping's pages would count as our
    memory.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # it has checked the header and the length of the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        self.path, self._start, self._entries = path, 8 + length, entries
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        row = BY_SAFETENSORS.get(self._entries[name]["dtype"])
        return None if row is None else row.torch

    def dtype_name(self, name: str) -> str:
        kind = self._entries[name]["dtype"]
        return BY_SAFETENSORS[kind].name if kind in BY_SAFETENSORS else kind

    def read(self, name: str) -> Tensor:
        return self._read(name, 0, torch.Size(self.shapes[name]).numel()).reshape(self.shapes[name])

    def run(self, name: str, start: int, end: int) -> Tensor:
        return self._read(name, start, end)

    def _read(self, name: str, start: int, end: int) -> Tensor:
        """Elements start..end of the flat tensor."""
        dtype = BY_SAFETENSORS[self._entries[name]["dtype"]].torch
        values = torch.empty(end - start, dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._entries[name]["data_offsets"][0] + start * dtype.itemsize)
            left = values.view(torch.uint8).numpy().data
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{self.path} was cut while it was read: download it again")
                left = left[count:]
        return values


class WeightFile:
    """One file of weights. `read` gives a copy of a tensor, `sample` a few elements."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self.shapes = self._file.shapes

    def read(self, name: str) -> Tensor:
        """A copy of a tensor. Raises: UserError for a damaged file."""
        return self._file.read(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor; None for one that torch does not know."""
        return self._file.dtype(name)

    def dtype_name(self, name: str) -> str:
        """Name of the dtype, as the file spells it."""
        return self._file.dtype_name(name)

    def run(self, name: str, start: int, end: int) -> Tensor:
        """Elements start..end of the flat tensor, in memory of their own."""
        return self._file.run(name, start, end)

    def sample(self, name: str, num_runs: int, run_length: int, first: int, end: int) -> Tensor:
        """Reads up to num_runs evenly spaced runs of neighbors among the elements first..end of the
        flat tensor; touches no other part of the file.
        """
        runs = sample_runs(first, end, num_runs, run_length)
        return torch.cat([self._file.run(name, *run) for run in runs])


def sample_runs(first: int, end: int, num_runs: int, run_length: int) -> list[tuple[int, int]]:
    """Places of up to num_runs evenly spaced runs among the numbers first..end."""
    last = max(end - run_length, first)
    starts = sorted({first + (last - first) * i // (num_runs - 1) for i in range(num_runs)})
    return [(start, min(start + run_length, end)) for start in starts]


def sample_of(flat: Tensor, num_runs: int, run_length: int) -> Tensor:
    """WeightFile.sample of a tensor in memory."""
    runs = sample_runs(0, flat.numel(), num_runs, run_length)
    return torch.cat([flat[start:end] for start, end in runs])


def open_weight_files(directory: Path) -> list[WeightFile]:
    """The files of a checkpoint directory; safetensors before pickles, and all of *.pt where there
    is none under the usual names.

    Raises: UserError for no file, a missing shard, both a single file and an index, a truncated
    file, a pickle that holds more than tensors.
    """
    for single, index in zip(SINGLES, INDEXES):
        has_single, has_index = (_is_there(directory / name) for name in (single, index))
        if has_single and has_index:
            raise UserError(
                f"{directory} holds both {single} and {index}, and one of them is left from an"
                " earlier save: delete that one"
            )
        if has_single:
            return [WeightFile(directory / single)]
        if has_index:
            return [
                WeightFile(_shard(directory, index, name))
                for name in shard_names(directory / index)
            ]
    others = sorted(directory.glob("*.pt"))
    if others:
        return [WeightFile(path) for path in others]
    raise UserError(
        f"{directory} holds no weights: expected one of {', '.join(SINGLES + INDEXES)}, or *.pt"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: UserError when it is missing, unreadable or not an
    object.
    """
    try:
        value = json.loads(read_file(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: give the directory of a checkpoint"
        ) from None
    except OSError as error:
        raise os_error(error, "read", path) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: download the checkpoint again") from None
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({first_line(error)}): download the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: download the checkpoint again")
    return value


def _is_there(path: Path) -> bool:
    """Whether a regular file is there. Raises: UserError for a link that leads nowhere."""
    if is_file(path):
        return True
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to {path.readlink()}, which is not there: download it again"
        )
    return False


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises: UserError for a damaged index."""
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} has no weight_map: download the checkpoint again")
    return sorted(set(names))


def _shard(directory: Path, index: str, name: str) -> Path:
    if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
        raise UserError(
            f"{directory / index} names {name[:SHOWN]!r}, not a weight file beside it: download it"
            " again"
        )
    if not _is_there(directory / name):
        raise UserError(
            f"{directory} lacks the shard {name[:SHOWN]} that {index} names: download it again"
        )
    return directory / name


def _open(path: Path) -> _Safetensors | PickledWeights:
    try:
        with open_regular(path) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
        return _Safetensors(path) if path.suffix == ".safetensors" else PickledWeights(path)
    except OSError as error:
        raise os_error(error, "read", path) from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise damaged(path, error) from None
