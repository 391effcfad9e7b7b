"""Element types: one row each, with its name in every format and library that this project meets.

The names are numpy's and torch's own, so `getattr(torch, row.name)` is torch's dtype; nothing heavy
is imported here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

ModelDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Dtype:
    """An element type.

    short: in options and names of folders; "" where no option names it.
    onnx: TensorProto.DataType, which ONNX Runtime shares; safetensors: in a file's header.
    tensorrt: the member of DataType; "" where no engine has tensors of it.
    stored: the numpy dtype that arrays of it have; bfloat16 is the bits of a uint16.
    """

    name: str
    num_bytes: int
    onnx: int
    safetensors: str
    short: str = ""
    tensorrt: str = ""
    stored: str = ""

    @property
    def numpy(self) -> Any:
        """numpy's dtype of arrays that hold it."""
        return importlib.import_module("numpy").dtype(self.stored or self.name)

    @property
    def torch(self) -> Any:
        """torch's dtype."""
        return getattr(importlib.import_module("torch"), self.name)


ROWS = (
    Dtype("float32", 4, 1, "F32", "fp32", "FLOAT"),
    Dtype("float16", 2, 10, "F16", "fp16", "HALF"),
    Dtype("bfloat16", 2, 16, "BF16", "bf16", "BF16", stored="uint16"),
    Dtype("int32", 4, 6, "I32", tensorrt="INT32"),
    Dtype("int64", 8, 7, "I64", tensorrt="INT64"),
    Dtype("int8", 1, 3, "I8", tensorrt="INT8"),
    Dtype("uint8", 1, 2, "U8", tensorrt="UINT8"),
    Dtype("float8_e4m3fn", 1, 17, "F8_E4M3", tensorrt="FP8", stored="uint8"),
    # In checkpoints alone: no graph has them.
    Dtype("float64", 8, 11, "F64"),
    Dtype("float8_e5m2", 1, 19, "F8_E5M2", stored="uint8"),
    Dtype("int16", 2, 5, "I16"),
    Dtype("bool", 1, 9, "BOOL"),
)
DTYPES = {row.name: row for row in ROWS}
BY_SAFETENSORS = {row.safetensors: row for row in ROWS}
BY_ONNX = {row.onnx: row for row in ROWS}
BY_TENSORRT = {row.tensorrt: row for row in ROWS if row.tensorrt}
# What --dtype offers, by its short name: weights, and keys and values unless they are int8.
MODEL_DTYPES = {row.short: row for row in ROWS if row.short}


def of_torch(dtype: Any) -> Dtype:
    """The row of torch's dtype. Raises: KeyError for one that no file or graph has."""
    return DTYPES[str(dtype).removeprefix("torch.")]
