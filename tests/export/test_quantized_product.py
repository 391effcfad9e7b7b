"""The operator for products with matrices in int4 and int8 (engines/operators), against float64 of
the weights that its codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.export.functions import DOMAIN
from ssd_export.export.operators import IR_VERSION, OPSET, Operators, onnx_dtype
from ssd_export.runtime.ort_operators import add_operators
from tests.engines.builds import OTHER_INSTRUCTIONS


@dataclass(frozen=True)
class Product:
    """Rows times a matrix [depth, width]; block 0: one scale an output."""

    rows: int
    depth: int
    width: int
    bits: int
    block: int

    def operands(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(codes as whole numbers int8 [depth, width], scale as stored, matrix float64)."""
        rng = np.random.default_rng([seed, self.rows, self.depth, self.width, self.bits])
        least, most = (-8, 7) if self.bits == 4 else (-128, 127)
        codes = rng.integers(least, most + 1, (self.depth, self.width), np.int8)
        blocks = (self.depth // self.block,) if self.block else ()
        scale = rng.uniform(0.5, 2, (*blocks, self.width)).astype(np.float32)
        full = np.repeat(scale, self.block, axis=0) if self.block else scale
        return codes, scale, codes * full.astype(np.float64)


def stored(codes: np.ndarray, bits: int) -> np.ndarray:
    """As the weights file holds them."""
    if bits == 8:
        return codes
    nibbles = codes.view(np.uint8) & 15
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


INT4 = [
    Product(rows, depth, width, 4, block)
    for rows, depth, width, block in (
        (1, 16, 2, 16),
        (2, 128, 704, 128),
        (3, 96, 130, 32),
        (5, 192, 66, 64),
        (7, 256, 384, 128),
        (1, 2048, 5124, 128),
        (2, 1024, 2048, 128),
        (2, 256, 11264, 128),
        (16, 512, 1030, 128),
        (33, 48, 250, 16),
        (65, 384, 1026, 128),
    )
]
INT8 = [
    Product(rows, depth, width, 8, 0)
    for rows, depth, width in (
        (1, 1, 1),
        (2, 128, 704),
        (3, 3, 33),
        (4, 131, 65),
        (2, 1027, 2049),
        (6, 300, 640),
        (13, 517, 513),
        (64, 256, 97),
    )
]


def session_of(
    library: Path, product: Product, matrix: np.ndarray, scale: np.ndarray, bias: bool, threads: int
) -> ort.InferenceSession:
    def value(name: str, shape: tuple[int | str, ...], array: np.ndarray | None) -> ir.Value:
        dtype = "float32" if array is None else array.dtype.name
        const = None if array is None else ir.tensor(array, name=name)
        kind = ir.TensorType(onnx_dtype(dtype))
        return ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=const)

    x, ops = value("x", ("rows", product.depth), None), Operators()
    constants = [value("matrix", matrix.shape, matrix), value("scale", scale.shape, scale)]
    biases = [value("bias", (product.width,), None)] * bias
    (out,) = ops.many(
        "QuantizedMatMul",
        x,
        *constants,
        *biases,
        domain=DOMAIN,
        num_outputs=1,
        bits=product.bits,
        block=product.block,
    )
    out.name, out.type = "out", ir.TensorType(onnx_dtype("float32"))
    graph = ir.Graph(
        [x, *biases],
        [out],
        nodes=ops.tape.nodes,
        initializers=constants,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="product",
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    add_operators(options, library)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return ort.InferenceSession(model, options)


def multiplied(
    library: Path,
    product: Product,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    threads: int = 1,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(what the operator gives, float64 of the same)."""
    codes, scale, exact = product.operands(seed)
    matrix = stored(codes, product.bits)
    session = session_of(library, product, matrix, scale, bias is not None, threads)
    given = {"x": x} if bias is None else {"x": x, "bias": bias}
    with np.errstate(all="ignore"):
        wanted = x.astype(np.float64) @ exact + (0 if bias is None else bias)
    return session.run(None, given)[0], wanted


def rounding_bound(product: Product, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """The most that rounding every activation to int8 may change: half a step of its block for
    each weight, beside float32's own errors.
    """
    _, _, exact = product.operands(seed)
    magnitude, block = np.abs(exact), product.block or 128
    bound = 3e-6 * (np.abs(x.astype(np.float64)) @ magnitude)
    for first in range(0, product.depth, block):
        part = slice(first, first + block)
        step = np.abs(x[:, part].astype(np.float64)).max(axis=1, keepdims=True) / 127
        bound = bound + 0.5001 * step * magnitude[part].sum(axis=0)
    return bound + 1e-33 * magnitude.sum(axis=0)


def check(library: Path) -> None:
    """Awkward sizes with random rows, with and without a bias."""
    for product in (*INT4, *INT8):
        rng = np.random.default_rng(product.depth)
        x = rng.standard_normal((product.rows, product.depth)).astype(np.float32)
        bias = rng.standard_normal(product.width).astype(np.float32) if product.rows % 2 else None
        found, wanted = multiplied(library, product, x, bias)
        assert np.all(np.abs(found - wanted) <= rounding_bound(product, x)), product


def test_products_are_those_of_the_weights(library: Path) -> None:
    check(library)


@pytest.mark.parametrize("instructions", OTHER_INSTRUCTIONS)
def test_other_processors_multiply_the_same(
    instructions: str, operators_of: Callable[[str], Path]
) -> None:
    check(operators_of(instructions))


@pytest.mark.parametrize("product", [INT4[1], INT4[4], INT4[8], INT8[1], INT8[4], INT8[6]])
def test_whole_numbers_are_multiplied_exactly(product: Product, library: Path) -> None:
    """Codes of activations and weights at their limits: nothing saturates, every code is in its
    place.
    """
    rng = np.random.default_rng(1)
    x = rng.choice([-127, -126, 0, 1, 127], (product.rows, product.depth)).astype(np.float32)
    x[:, ::16] = 127
    codes, scale, _ = product.operands()
    for extreme in (None, codes.min(), codes.max()):
        whole = codes if extreme is None else np.full_like(codes, extreme)
        ones = np.ones_like(scale)
        session = session_of(library, product, stored(whole, product.bits), ones, False, 1)
        found = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(found, x.astype(np.float64) @ whole, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("product", [INT4[1], INT4[8], INT8[4], INT8[7]])
def test_rows_do_not_depend_on_each_other_or_on_threads(product: Product, library: Path) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((product.rows, product.depth)).astype(np.float32)
    found, _ = multiplied(library, product, x)
    again, _ = multiplied(library, product, x, threads=3)
    np.testing.assert_array_equal(found, again)
    x[0] *= 1e6
    other, _ = multiplied(library, product, x)
    np.testing.assert_array_equal(found[1:], other[1:])


@pytest.mark.parametrize("product", [INT4[1], INT4[8], INT8[4], INT8[6]])
def test_awkward_rows(product: Product, library: Path) -> None:
    """Zeros of both signs, outliers and numbers of every magnitude keep the bound; rows that are
    no numbers have results that are none, and leave the others alone.
    """
    rng = np.random.default_rng(3)
    x = rng.standard_normal((product.rows, product.depth)).astype(np.float32)
    for row, made in (
        (0, np.where(x[0] > 0, np.float32(0), np.float32(-0.0))),
        (1, np.where(np.arange(product.depth) == 5, np.float32(1e30), x[1])),
    ):
        changed = x.copy()
        changed[row] = made
        found, wanted = multiplied(library, product, changed)
        assert np.all(np.abs(found - wanted) <= rounding_bound(product, changed))
    for tiny in (1e-45, 1e-38, 1e-36, 3e-34):
        found, wanted = multiplied(library, product, x * np.float32(tiny))
        assert np.all(np.abs(found - wanted) <= rounding_bound(product, x * np.float32(tiny)))
    sound, _ = multiplied(library, product, x)
    for spoiled in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[1, product.depth // 2] = spoiled
        found, _ = multiplied(library, product, broken)
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(np.delete(found, 1, 0), np.delete(sound, 1, 0))


@pytest.mark.parametrize(
    "block, change, message",
    [
        (7, {}, "16 to 128"),
        (256, {}, "16 to 128"),
        (128, {"scale": np.ones((3, 704), np.float32)}, "one scale a block"),
        (128, {"matrix": np.zeros((130, 352), np.uint8)}, "another width|do not divide"),
        (128, {"matrix": np.zeros((128, 352), np.int8)}, "another type"),
    ],
)
def test_what_does_not_fit_is_refused(
    block: int, change: dict[str, np.ndarray], message: str, library: Path
) -> None:
    product = Product(2, 128, 704, 4, block)
    codes, scale, _ = Product(2, 128, 704, 4, 128).operands()
    given = {"matrix": stored(codes, 4), "scale": scale} | change
    with pytest.raises(Exception, match=f"QuantizedMatMul.*({message})"):
        session = session_of(library, product, given["matrix"], given["scale"], False, 1)
        session.run(None, {"x": np.zeros((2, 128), np.float32)})
