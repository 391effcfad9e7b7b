"""Tensors in one file beside the graphs that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

ALIGNMENT = 64  # bytes


class TensorFile:
    """A file of tensors that several graphs beside it read."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, dict[str, ir.ExternalTensor]()
        path.write_bytes(b"")

    def stored(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """The tensor of this name, written at its first use."""
        if name not in self._tensors:
            with self._path.open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                offset = file.tell()
                length = file.write(np.ascontiguousarray(array).tobytes())
            self._tensors[name] = ir.ExternalTensor(
                self._path.name,
                offset,
                length,
                ir.tensor(array).dtype,
                shape=ir.Shape(array.shape),
                name=name,
            )
        return self._tensors[name]
