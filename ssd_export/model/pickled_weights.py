"""Weights in torch's own format: a zip file with a pickle of names and the numbers beside it.

Nothing of the pickle is executed: torch's weights-only loader reads it, mapped.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_export.errors import UserError, first_line
from ssd_export.os_errors import os_error

COPY_BYTES = (
    32 << 20
)  # of a mapped pickle that are in memory at once, beside the tensor they are copied to
MADV_DONTNEED = 4
MAX_PICKLE_BYTES = 256 << 20  # of names and shapes: a thousand tensors take a hundred kilobytes
STATE_DICTS = ("model", "module", "state_dict")
SHOWN = 80  # characters of a foreign name in a message


class PickledWeights:
    """The tensors of a torch zip file as views of the mapped file."""

    def __init__(self, path: Path) -> None:
        _check_zip(path)
        self._views = _named_tensors(path, _load(path))
        self.shapes = {name: tuple(view.shape) for name, view in self._views.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor."""
        return self._views[name].dtype

    def dtype_name(self, name: str) -> str:
        """Name of the dtype, as torch spells it."""
        return str(self._views[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """A copy of a tensor; the file's pages are given back."""
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
        """A copy of elements start..end of a tensor, flat."""
        view = self._views[name]
        values = view.reshape(-1)[start:end].clone()
        if view.is_contiguous():
            _forget_pages(
                view
            )  # the system mapped more than was read: up to 64 KB for each of thousands of runs
        return values


def _check_zip(path: Path) -> None:
    """Raises UserError for another format, and for a file that grows when it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            whole = file.read(2) != b"PK"
        if whole:
            raise UserError(
                f"{path} is not in torch's zip format: save it again with torch.save"
            ) from None
        raise damaged(path, error) from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is compressed, as torch.save writes no file: save it again")
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise UserError(
                f"{path} is refused: its index alone has {entry.file_size} bytes, and no checkpoint"
                f" needs more than {MAX_PICKLE_BYTES}"
            )


def _load(path: Path) -> object:
    """Object in the pickle; none of its code is executed. Raises: UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise damaged(path, error) from None
        raise UserError(
            f"{path} is refused: its pickle holds more than tensors and could run code; "
            "use the weights from the official repository, or a safetensors file"
        ) from None
    except OSError as error:
        raise os_error(error, "read", path) from None
    except Exception as error:  # damaged pickles raise whatever their pieces are good for
        raise damaged(path, error) from None


def _named_tensors(path: Path, state: object) -> dict[str, Tensor]:
    """Plain tensors by name. Raises: UserError for other keys, and for tensors without numbers of
    their own: sparse, quantized, on no device, or one number expanded to many.
    """
    values: Mapping[Any, Any] = state if isinstance(state, Mapping) else {}
    if path.suffix == ".pt":  # saved while training, beside the optimizer's state
        states = [values[key] for key in STATE_DICTS if isinstance(values.get(key), Mapping)]
        values = states[0] if states else values
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor):
            continue
        name = str(key)[:SHOWN]
        if not isinstance(key, str):
            raise UserError(
                f"{path} holds a tensor under {name}, which is no name: save a state_dict"
            )
        plain = value.layout == torch.strided and value.device.type == "cpu"
        plain = (
            plain and not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()
        )
        if not plain:
            kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise UserError(
                f"{path}: {name} is no plain tensor ({kind}, {str(value.dtype)[6:]}): save it again"
                " with value.to_dense().clone()"
            )
        tensors[key] = value.detach()
    if not tensors:
        nested = next((str(key) for key, value in values.items() if isinstance(value, dict)), None)
        where = f"; save what is under {nested[:SHOWN]!r} alone" if nested else ""
        raise UserError(
            f"{path} holds no tensors by name{where}: give the checkpoint's own pytorch_model.bin"
        )
    return tensors


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


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be read, with its reason."""
    return UserError(
        f"{path} is truncated or not a weight file ({first_line(error)}): download it again"
    )
