"""The rows of dtypes.py agree with the libraries that they name, and no other table repeats
them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import save_file

from ssd_export.dtypes import BY_SAFETENSORS, DTYPES, MODEL_DTYPES, ROWS, Dtype, of_torch

ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e4m3fn": "FLOAT8E4M3FN"}
ONNX_NAMES |= {"float8_e5m2": "FLOAT8E5M2"}
SOURCES = sorted((Path(__file__).parents[1] / "ssd_export").rglob("*.py"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_what_the_libraries_say(row: Dtype) -> None:
    assert of_torch(row.torch) is row and row.torch.itemsize == row.num_bytes
    assert row.numpy.itemsize == row.num_bytes
    assert row.onnx == TensorProto.DataType.Value(ONNX_NAMES.get(row.name, row.name.upper()))
    if not row.stored:
        assert torch.from_numpy(np.zeros(1, row.numpy)).dtype == row.torch


def test_safetensors_names_are_its_own(tmp_path: Path) -> None:
    save_file({row.name: torch.zeros(2, dtype=row.torch) for row in ROWS}, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert all(BY_SAFETENSORS[entry["dtype"]].name == name for name, entry in header.items())


def test_tensorrt_names_are_its_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT: ssd-export[rtx]")
    assert {row.tensorrt for row in ROWS if row.tensorrt} <= trt.DataType.__members__.keys()


def test_names_are_unique() -> None:
    assert len(DTYPES) == len(BY_SAFETENSORS) == len({row.onnx for row in ROWS}) == len(ROWS)
    assert list(MODEL_DTYPES) == ["fp32", "fp16", "bf16"]


def test_no_other_table_has_a_row_for_each_dtype() -> None:
    """Bytes and names stand in dtypes.py alone; what was measured by dtype is another matter."""
    names = {"float16", "bfloat16"}, {"fp16", "bf16"}, {"F16", "BF16"}, {"HALF", "BF16"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                found += [f"{path.parent.name}/{path.name}"] * any(pair <= keys for pair in names)
    assert found == ["plan/memory.py"] * 2 + ["verify/tolerances.py"]
