"""Weights of a checkpoint directory, tensor by tensor: safetensors or torch pickles, in one file or
sharded.

A tensor at a time is read, never a whole file, and nothing is executed: pickles go through torch's
weights-only loader, mapped.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_export.dtypes import BY_SAFETENSORS
from ssd_export.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
COPY_BYTES = (
    32 << 20
)  # of a mapped pickle that are in memory at once, beside the tensor they are copied to
MADV_DONTNEED = 4


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

    def read(self, name: str) -> Tensor:
        return self._read(name, 0, torch.Size(self.shapes[name]).numel()).reshape(self.shapes[name])

    def run(self, name: str, start: int, end: int) -> Tensor:
        return self._read(name, start, end)

    def _read(self, name: str, start: int, end: int) -> Tensor:
        """Elements start..end of the flat tensor."""
        dtype = self.dtype(name)
        if dtype is None:
            kind = self._entries[name]["dtype"]
            raise UserError(f"{self.path}: {name} is {kind}: give the unquantised float weights")
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


class _Pickle:
    """The tensors of a torch zip file as views of the mapped file."""

    def __init__(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise UserError(
                f"{path} holds no tensors by name: give the checkpoint's original pytorch_model.bin"
            )
        self._views = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.shapes = {name: tuple(view.shape) for name, view in self._views.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        return self._views[name].dtype

    def read(self, name: str) -> Tensor:
        view = self._views[name]
        if not view.is_contiguous():
            return view.clone(memory_format=torch.contiguous_format)
        values, flat = torch.empty_like(view), view.reshape(-1)
        step = COPY_BYTES // view.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            values.view(-1)[start : start + step] = part
            _forget_pages(part)
        return values

    def run(self, name: str, start: int, end: int) -> Tensor:
        view = self._views[name]
        values = view.reshape(-1)[start:end].clone()
        if view.is_contiguous():
            _forget_pages(
                view
            )  # the system mapped more than was read: up to 64 KB for each of thousands of runs
        return values


def _forget_pages(view: Tensor) -> None:
    """Takes the pages of a view of a mapped file from this process: they would count as its memory
    (Linux).
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = view.data_ptr() // page * page
    end = -(-(view.data_ptr() + view.nbytes) // page) * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


class WeightFile:
    """One file of weights. `read` gives a tensor of its own memory, `sample` a few elements."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self.shapes = self._file.shapes

    def read(self, name: str) -> Tensor:
        return self._file.read(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """None for one that torch does not know."""
        return self._file.dtype(name)

    def sample(self, name: str, num_runs: int, run_length: int) -> Tensor:
        """Up to num_runs evenly spaced runs of neighbours, flat; touches no other part of the
        file.
        """
        size = torch.Size(self.shapes[name]).numel()
        last = max(size - run_length, 0)
        starts = sorted({last * i // (num_runs - 1) for i in range(num_runs)})
        return torch.cat(
            [self._file.run(name, start, min(start + run_length, size)) for start in starts]
        )


def open_weight_files(directory: Path) -> list[WeightFile]:
    """The files of a checkpoint directory; safetensors before pickles, an index before a single
    file.

    Raises: UserError for no file, a missing shard, a truncated file, a pickle that holds more than
    tensors.
    """
    for index in INDEXES:
        if (directory / index).is_file():
            return [
                WeightFile(_shard(directory, index, name))
                for name in _shard_names(directory / index)
            ]
    for single in SINGLES:
        if (directory / single).is_file():
            return [WeightFile(directory / single)]
    raise UserError(f"{directory} holds no weights: expected one of {', '.join(SINGLES + INDEXES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: UserError when it is missing, unreadable or not an
    object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: give the directory of a Janus-Pro checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({_one_line(error)}): download the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: download the checkpoint again")
    return value


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UserError(f"{index} has no weight_map: download the checkpoint again")
    return sorted(set(weight_map.values()))


def _shard(directory: Path, index: str, name: str) -> Path:
    if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
        raise UserError(
            f"{directory / index} names {name!r}, not a weight file beside it: download it again"
        )
    if not (directory / name).is_file():
        raise UserError(f"{directory} lacks the shard {name} that {index} names: download it again")
    return directory / name


def _open(path: Path) -> _Safetensors | _Pickle:
    try:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
        return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: its pickle holds more than tensors and could run code; "
            "use the weights from the official repository, or a safetensors file"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        if "mmap can only be used" in str(error):  # a plain pickle, or torch's format of before 1.6
            raise UserError(
                f"{path} is not in torch's zip format: save it again with torch.save"
            ) from None
        reason = _one_line(error)
        raise UserError(
            f"{path} is truncated or not a weight file ({reason}): download it again"
        ) from None


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
