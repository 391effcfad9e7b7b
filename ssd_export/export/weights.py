"""The bundle's one weights file: `onnx/weights.safetensors`, written tensor by tensor, read by
every backend.

A safetensors file is a JSON header and then raw tensors, so an ONNX initializer can point into it
as external data while torch and numpy read it by name. Matrices are stored as the graphs multiply
them ([in, out]), q, k and v as one matrix, gate and up as one, heads in the order of the policy
table: no backend rearranges weights at load.

    header   8 bytes little-endian length, JSON {name: {dtype, shape, data_offsets}}, spaces up to a
    multiple of 64 data     the tensors in the order of the header, without gaps
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssd_export.dtypes import of_torch
from ssd_export.export.journal import Journal
from ssd_export.model.conversion import check_finite
from ssd_export.model.quantization import Scheme

WEIGHTS_FILE = "weights.safetensors"
ALIGNMENT = 64
NOT_FINITE = "use --dtype fp32, or --weights none"


@dataclass(frozen=True)
class Weight:
    """One tensor of the file and how it is made from the checkpoint; shape is known before anything
    is read.

    scheme: of the codes and the scale of a quantized matrix (model/quantization.py).
    working_bytes: the most memory that making it takes, itself included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    scheme: Scheme | None = None
    working_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the weights file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    path: Path,
    weights: Iterable[Weight],
    journal: Journal,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, tuple[int, int]]:
    """Writes the file, one tensor in memory at a time, from where the journal says that it ends.

    Args: progress: told the bytes of what is there already, then of each tensor written.
    Returns: (offset, length) in bytes of each tensor.
    Raises: UserError for a value that is not finite; ValueError if a tensor is not what was planned
    (a bug).
    """
    weights = list(weights)
    header, places = _header(weights)
    stream, finished = journal.open_weights(
        path, header, [sum(places[weight.name]) for weight in weights]
    )
    with stream:
        progress(sum(weight.num_bytes for weight in weights[:finished]))
        for weight in weights[finished:]:
            tensor = weight.make()
            if tensor.shape != weight.shape or tensor.dtype != weight.dtype:
                raise ValueError(
                    f"{weight.name} is {tensor.dtype} {tuple(tensor.shape)}, planned {weight}"
                )
            if tensor.dtype.is_floating_point and tensor.element_size() > 1:
                check_finite(tensor, f"{weight.name}, as it would be written,", NOT_FINITE)
            stream.write(
                tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""
            )
            del tensor  # else it would still be there while the next one is made
            journal.note(weight.name, *stream.finished())
            progress(weight.num_bytes)
    return places


def _header(weights: list[Weight]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    entries: dict[str, dict[str, object]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    offset = 0
    for weight in weights:
        end = offset + weight.num_bytes
        ranges[weight.name] = (offset, weight.num_bytes)
        entries[weight.name] = {
            "dtype": of_torch(weight.dtype).safetensors,
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    places = {name: (start + begin, length) for name, (begin, length) in ranges.items()}
    return len(text).to_bytes(8, "little") + text, places
