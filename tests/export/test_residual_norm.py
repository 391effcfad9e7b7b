"""The operator between two convolutions of the image decoder (engines/operators): against numpy in
float64, by its properties, and as the decoder that is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.config import NUM_GROUPS
from ssd_export.export.functions import DOMAIN
from ssd_export.export.operators import IR_VERSION, OPSET, Operators
from ssd_export.model.image_decoder import EPS
from ssd_export.runtime.ort_operators import add_operators
from tests.engines.builds import OTHER_INSTRUCTIONS

ZERO_POINT = 9


@dataclass(frozen=True)
class Case:
    """What the operator reads and writes. mean: of x, whose spread is about 1."""

    name: str
    x: bool = True
    codes: bool = True
    norm: bool = True
    silu: bool = True
    quantizes: bool = True
    keeps: bool = False
    channels_first: bool = False
    shape: tuple[int, ...] = (2, 5, 7, 64)
    mean: float = 0.0
    seed: int = 0

    def tensors(self) -> dict[str, np.ndarray]:
        """Inputs by name, in the operator's order."""
        random, channels = np.random.RandomState(self.seed), self.shape[-1]
        found = {
            "x": (random.randn(*self.shape) + self.mean).astype(np.float32),
            "codes": random.randint(0, 256, self.shape).astype(np.uint8),
            "scale": (0.01 + 0.03 * random.rand(channels)).astype(np.float32),
            "zero_point": random.randint(0, 256, channels).astype(np.uint8),
            "gamma": random.randn(channels).astype(np.float32),
            "beta": random.randn(channels).astype(np.float32),
            "out_scale": (0.005 + 0.02 * random.rand(channels)).astype(np.float32),
        }
        left_out = [] if self.x else ["x"]
        left_out += [] if self.codes else ["codes", "scale", "zero_point"]
        left_out += [] if self.norm else ["gamma", "beta"]
        left_out += [] if self.quantizes else ["out_scale"]
        return {name: array for name, array in found.items() if name not in left_out}


CASES = [
    Case("whole", keeps=True),
    Case("whole, not kept"),
    Case("codes", x=False),
    Case("codes, kept", x=False, keeps=True),
    Case("stream", codes=False),
    Case("floats", quantizes=False, keeps=True),
    Case("image", quantizes=False, channels_first=True),
    Case("attention", codes=False, silu=False, quantizes=False, keeps=True),
    Case("sum", norm=False, silu=False, quantizes=False),
    Case("sum as codes", norm=False, silu=False),
    Case("codes as floats", x=False, norm=False, silu=False, quantizes=False),
    Case("sum, channels first", norm=False, silu=False, quantizes=False, channels_first=True),
    Case("one place", shape=(1, 1, 1, 32), keeps=True),
    Case("one group a vector", shape=(1, 3, 512), keeps=True),
    Case("a vector beside four", shape=(3, 17, 3, 96)),
    Case("several blocks", shape=(2, 37, 41, 160), keeps=True),
    Case("far from zero", mean=3000.0, quantizes=False, codes=False),
]


def session(case: Case, library: Path, num_threads: int = 1) -> ort.InferenceSession:
    ops, given = Operators(), case.tensors()
    order = ["x", "codes", "scale", "zero_point", "gamma", "beta"]
    order += ["out_scale"] if case.quantizes else []
    values = {
        name: ir.Value(
            name=name,
            shape=ir.Shape([None] * array.ndim),
            type=ir.TensorType(ir.tensor(array).dtype),
        )
        for name, array in given.items()
    }
    outputs = ops.many(
        "ResidualNormQuantize" if case.quantizes else "ResidualNorm",
        *(values.get(name) for name in order),
        num_outputs=1 + case.keeps,
        domain=DOMAIN,
        num_groups=NUM_GROUPS,
        epsilon=EPS,
        silu=int(case.silu),
        channels_first=int(case.channels_first),
        zero_point=ZERO_POINT,
    )
    kinds = [ir.DataType.UINT8 if case.quantizes else ir.DataType.FLOAT, ir.DataType.FLOAT]
    for name, value, kind in zip(("result", "sum"), outputs, kinds, strict=False):
        value.name, value.type = name, ir.TensorType(kind)
    graph = ir.Graph(
        list(values.values()),
        outputs,
        nodes=ops.tape.nodes,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="norm",
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 4
    add_operators(options, library)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def oracle(case: Case, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(result before it is rounded, sum) in float64, channels last."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    total = wide["x"] if case.x else np.zeros(case.shape)
    if case.codes:
        total = total + wide["scale"] * (wide["codes"] - wide["zero_point"])
    found = total
    if case.norm:
        groups = total.reshape(case.shape[0], -1, NUM_GROUPS, case.shape[-1] // NUM_GROUPS)
        centre = groups.mean(axis=(1, 3), keepdims=True)
        spread = groups.var(axis=(1, 3), keepdims=True)
        normed = ((groups - centre) / np.sqrt(spread + EPS)).reshape(case.shape)
        found = normed * wide["gamma"] + wide["beta"]
    if case.silu:
        found = found / (1 + np.exp(-found))
    return found, total


def assert_is_oracle(case: Case, library: Path) -> None:
    given = case.tensors()
    found = session(case, library).run(None, given)
    wanted, total = oracle(case, given)
    if case.quantizes:
        exact = wanted / given["out_scale"].astype(np.float64) + ZERO_POINT
        assert found[0].dtype == np.uint8
        # the nearest whole number, but where two are as near but for float32
        assert np.abs(found[0] - exact.clip(0, 255)).max() <= 0.5 + 1e-3
        assert len(np.unique(found[0])) > 16
    else:
        result = np.moveaxis(found[0], 1, -1) if case.channels_first else found[0]
        bound = 1e-5 * max(1.0, case.mean)
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=bound)
    if case.keeps:
        np.testing.assert_allclose(found[1], total, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operator_is_the_oracle(case: Case, library: Path) -> None:
    for seed in (1, 2):
        assert_is_oracle(replace(case, seed=seed), library)


@pytest.mark.parametrize("instructions", OTHER_INSTRUCTIONS)
def test_other_processors_compute_the_same(
    instructions: str, operators_of: Callable[[str], Path]
) -> None:
    only = operators_of(instructions)
    for case in CASES:
        assert_is_oracle(case, only)


def test_images_and_threads_do_not_meet(library: Path) -> None:
    """An image of a batch and one by itself, one thread and three: the same bits."""
    case = replace(CASES[0], shape=(3, 61, 67, 64))
    given = case.tensors()
    together = session(case, library).run(None, given)
    for other in (session(case, library, 3).run(None, given),):
        assert all(np.array_equal(*pair) for pair in zip(together, other, strict=True))
    for image in range(3):
        one = {n: a[image : image + 1] if a.ndim > 1 else a for n, a in given.items()}
        alone = session(case, library).run(None, one)
        assert all(np.array_equal(a[image], b[0]) for a, b in zip(together, alone, strict=True))


def test_places_may_change_their_order(library: Path) -> None:
    """GroupNorm knows no places: codes of permuted places are the permuted codes, but for the
    order of sums.
    """
    case = replace(CASES[0], shape=(1, 143, 64))
    given, order = case.tensors(), np.random.RandomState(5).permutation(143)
    plain = session(case, library).run(None, given)
    moved = session(case, library).run(
        None, {name: array[:, order] if array.ndim > 1 else array for name, array in given.items()}
    )
    assert np.array_equal(plain[1][:, order], moved[1])
    apart = plain[0][:, order].astype(int) - moved[0]
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 1e-3


def test_what_is_not_finite_is_not_hidden(library: Path) -> None:
    case = Case("floats", quantizes=False, codes=False)
    given = case.tensors()
    given["x"][0, 1, 2, 3] = np.nan
    (found,) = session(case, library).run(None, given)
    assert np.isnan(found[0, ..., 2:4]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"codes": np.zeros((2, 5, 7, 32), np.uint8)}, "different shapes"),
        ({"gamma": np.zeros(7, np.float32)}, "not one parameter a channel"),
        (
            {
                "x": np.zeros((2, 5, 7, 24), np.float32),
                "codes": np.zeros((2, 5, 7, 24), np.uint8),
            },
            "not a multiple of 16",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_errors(
    damage: dict[str, np.ndarray], message: str, library: Path
) -> None:
    with pytest.raises(Exception, match=message):
        session(CASES[0], library).run(None, CASES[0].tensors() | damage)
