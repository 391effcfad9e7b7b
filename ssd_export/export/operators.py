"""A thin recorder over onnx-ir: writes ordinary operators of opset 18 as method calls, constants
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ssd_export.dtypes import DTYPES

OPSET = 18
IR_VERSION = 10


def onnx_dtype(dtype: str) -> ir.DataType:
    """ONNX's element type of one of ours."""
    return ir.DataType(DTYPES[dtype].onnx)


class Operators:
    """Records nodes; `op("Add", a, b)` returns the output value. Equal constants are written once.

    Constants are Constant nodes, so that the same code writes graphs and local functions.
    """

    def __init__(self) -> None:
        self.tape = Tape()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Adds a node with one output."""
        value = self.tape.op(op_type, inputs, attributes)
        value.name = name
        return value

    def many(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        num_outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Adds a node with several outputs."""
        return list(
            self.tape.op_multi_out(
                op_type, inputs, attributes, num_outputs=num_outputs, domain=domain
            )
        )

    def constant(self, values: object, dtype: str = "int64") -> ir.Value:
        """A constant, one for equal values and dtype."""
        if dtype == "bfloat16":
            return self.op("Cast", self.constant(values, "float32"), to=onnx_dtype(dtype))
        array = np.asarray(values, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """Adds a Cast."""
        return self.op("Cast", value, to=onnx_dtype(dtype))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """0 keeps a dimension, -1 is worked out."""
        return self.op("Reshape", value, self.constant(list(shape)))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Splits along an axis; one size is the value itself."""
        if len(sizes) == 1:
            return [value]
        return self.many(
            "Split", value, self.constant(list(sizes)), num_outputs=len(sizes), axis=axis
        )
