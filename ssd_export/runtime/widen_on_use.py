"""A float16 graph for the CPU whose matrices are widened one at a time, each when it is multiplied
by.

ONNX Runtime's CPU provider multiplies in float32. Left alone it widens every float16 matrix when it
opens a graph, and packs the copy: twice the weights file, and more while it does so. Here every
matrix [in, out] is read as

    MatMul(Cast(x, float32), Cast(Reshape(matrix, 0 x Shape(x)), float32)), rounded back to float16

so the matrix stays where the file is mapped, and its float32 copy lives for one product. The
Reshape changes nothing (a dimension of 0 keeps the matrix's) and copies nothing. Its shape comes
from x: unknown when the graph is opened, so that the Cast is not folded, and known only once x is,
so that it waits. Casts without it ran as soon as the graph began for half of the matrices, whose
copies then all waited for their layers. The numbers are those of the matrices widened at once
within the rounding of float16: sums have another order, because packed and plain matrices have
different kernels, and ONNX Runtime rounds to float16 between other operators.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
ZEROS = "widen_on_use.zeros"


def widened_on_use(path: Path) -> bytes:
    """The graph of a file in this form, serialized; its weights stay in the file beside it."""
    model = ir.load(path)
    graph = model.graph
    tensor = ir.tensor(np.zeros(2, np.int64), name=ZEROS)
    zeros = ir.Value(
        name=ZEROS, const_value=tensor, shape=ir.Shape([2]), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(zeros)
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        matrix = node.inputs[1]
        if matrix is not None and matrix.is_initializer() and matrix.dtype == FLOAT16:
            _widen(graph, node, zeros)
    return ir.to_proto(model).SerializeToString()


def _widen(graph: ir.Graph, node: ir.Node, zeros: ir.Value) -> None:
    """Replaces x @ matrix by the same in float32."""
    x, matrix = node.inputs
    assert x is not None and matrix is not None  # MatMul has no optional input
    product = node.outputs[0]
    rows = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    shape = ir.node("Mul", [rows.outputs[0], zeros])
    same = ir.node("Reshape", [matrix, shape.outputs[0]])
    wide = ir.node("Cast", [same.outputs[0]], attributes={"to": FLOAT}, name=f"{matrix.name}.wide")
    wide_x = ir.node("Cast", [x], attributes={"to": FLOAT})
    wide_product = ir.node(
        "MatMul", [wide_x.outputs[0], wide.outputs[0]], name=f"{matrix.name}.product"
    )
    rounded = ir.node("Cast", [wide_product.outputs[0]], attributes={"to": FLOAT16})
    product.replace_all_uses_with(rounded.outputs[0])
    graph.insert_before(node, [rows, shape, same, wide, wide_x, wide_product, rounded])
    graph.remove(node, safe=True)
    rounded.outputs[0].name = product.name
