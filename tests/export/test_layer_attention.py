"""The operator for the attention of a layer (engines/operators): against the oracle case by case,
beside the ordinary operators token by token, and what is said where it is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssd_export.bundle.graphs import part_names
from ssd_export.errors import UserError
from ssd_export.export import fused_step
from ssd_export.export.exporter import export_bundle
from ssd_export.export.functions import DOMAIN, AttentionNode
from ssd_export.export.layer_attention import layer_attention
from ssd_export.export.operators import IR_VERSION, OPSET, Operators, onnx_dtype
from ssd_export.export.temporary_bundle import PolicyChoice
from ssd_export.noise import GumbelNoise, ImageSeed
from ssd_export.runtime import ort_operators
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_operators import (
    LIBRARY,
    LIBRARY_VARIABLE,
    add_operators,
    noise_maker,
)
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling
from ssd_export.verify.spec import VerifySpec
from ssd_export.verify.verify import verify
from tests.cases import CASES, INT8_CASES, Case, assert_matches_oracle
from tests.engines.builds import OTHER_INSTRUCTIONS
from tests.export.test_functions import OrtBackend
from tests.runtime.near_ties import assert_same_tokens

CAPTIONS = ["a red circle above a blue square", "two green triangles"]


class FusedBackend(OrtBackend):
    """The case's head group as a layer: its rows concatenated, RoPE that turns by nothing."""

    def __init__(self, case: Case, library: Path, dtype: str = "float32") -> None:
        self.library = library
        super().__init__(case, dtype)
        options = ort.SessionOptions()
        add_operators(options, library)
        model = ir.to_proto(self._layer_model()).SerializeToString()
        self.step_session = ort.InferenceSession(model, options)
        self.evict_session = None  # the operator evicts

    def _run(
        self, session: ort.InferenceSession, given: dict[str, np.ndarray]
    ) -> np.ndarray | None:
        if "query" in given:
            rows = np.concatenate([given.pop(name) for name in ("query", "key", "value")], axis=1)
            angles = (len(rows), 1, 1, self.case.head_dim // 2)
            given |= {
                "qkv": rows.reshape(len(rows), -1).astype(np.float32),
                "cos": np.ones(angles, np.float32),
                "sin": np.zeros(angles, np.float32),
            }
        found = super()._run(session, given)
        if found is None:
            return None
        return found.reshape(len(found), -1, self.case.head_dim)

    def _layer_model(self) -> ir.Model:
        case, values = self.case, self._values()
        num_rows = case.num_heads * (case.query_group_size + 2)
        token = {
            "qkv": ("B", num_rows * case.head_dim),
            "cos": ("B", 1, 1, case.head_dim // 2),
            "sin": ("B", 1, 1, case.head_dim // 2),
        }
        of_token = [_float(name, shape) for name, shape in token.items()]
        of_token += [values["position"], values["prompt_length"]]
        parts = part_names(case.rule, case.kv_dtype)
        past, ops = [values[f"past_{part}"] for part in parts], Operators()
        out, present = layer_attention(ops, [self.node], of_token, past)
        out.name, out.type = "out", ir.TensorType(onnx_dtype("float32"))
        for part, value, old in zip(parts, present, past, strict=True):
            value.name, value.type = f"present_{part}", old.type
        graph = ir.Graph(
            [*of_token, *past],
            [out, *present],
            nodes=ops.tape.nodes,
            opset_imports={"": OPSET, DOMAIN: 1},
            name="layer",
        )
        return ir.Model(graph, ir_version=IR_VERSION)


def _float(name: str, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype("float32")))


def is_meant(case: Case) -> bool:
    """RoPE turns pairs."""
    return case.head_dim % 2 == 0


# The widths that are compiled apart, beside those of the cases.
WIDE = [
    replace(case, name=f"{case.name}-{width}", head_dim=width)
    for case in CASES
    if case.name in ("scored-every-6", "scored-gqa-2")
    for width in (32, 64, 128)
]


WIDE += [replace(case, name=f"{case.name}-int8", kv_dtype="int8") for case in WIDE]
# Each case with the dtype of its cache where that is not int8; float16 holds the cases' numbers.
EVERY = [
    (case, dtype)
    for case in [*filter(is_meant, (*CASES, *INT8_CASES)), *WIDE]
    for dtype in ("float32", "float16")
    if case.kv_dtype == "model" or dtype == "float32"
]


@pytest.mark.parametrize("case, dtype", EVERY, ids=lambda one: getattr(one, "name", one))
def test_the_operator_is_the_oracle(case: Case, dtype: str, library: Path) -> None:
    assert_matches_oracle(case, FusedBackend(case, library, dtype))


@pytest.mark.parametrize("instructions", OTHER_INSTRUCTIONS)
def test_other_processors_compute_the_same(
    instructions: str, operators_of: Callable[[str], Path]
) -> None:
    only = operators_of(instructions)
    for case, dtype in EVERY:
        assert_matches_oracle(case, FusedBackend(case, only, dtype))
    check_single_operators(only)


def run_node(
    library: Path, op_type: str, feeds: dict[str, np.ndarray], constant: str = ""
) -> np.ndarray:
    """What one operator of the library makes of its inputs, one of which may be a constant."""
    given = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(onnx_dtype(array.dtype.name)),
            const_value=ir.tensor(array, name=name) if name == constant else None,
        )
        for name, array in feeds.items()
    }
    ops = Operators()
    (out,) = ops.many(op_type, *given.values(), domain=DOMAIN, num_outputs=1)
    out.name = "out"
    out.type = ir.TensorType(onnx_dtype("int32" if op_type == "DrawToken" else "float32"))
    constants = [value for name, value in given.items() if name == constant]
    graph = ir.Graph(
        [value for name, value in given.items() if name != constant],
        [out],
        nodes=ops.tape.nodes,
        initializers=constants,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="one",
    )
    options = ort.SessionOptions()
    add_operators(options, library)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    wanted = {name: array for name, array in feeds.items() if name != constant}
    return ort.InferenceSession(model, options).run(None, wanted)[0]


def check_single_operators(library: Path) -> None:
    """Products of awkward sizes in each storage, gates, draws and noise against numpy."""
    rng = np.random.default_rng(5)
    for rows, depth, width, storage in PRODUCTS:
        exact = rng.standard_normal((depth, width)).astype(np.float32)
        if storage == "bfloat16":  # down to numbers that float16 has not
            exact = (exact * np.float32(1e-7)).view(np.uint32) & np.uint32(0xFFFF0000)
            exact = exact.view(np.float32)
        elif storage == "float16":
            exact = exact.astype(np.float16).astype(np.float32)
        x = rng.standard_normal((rows, depth)).astype(np.float32)
        bias = rng.standard_normal(width).astype(np.float32) * exact.std()
        given = {"x": x, "matrix": exact, **({"bias": bias} if width % 2 else {})}
        found = run_node(library, "PackedMatMul", given, "matrix")
        if storage == "float16":
            halves = given | {"matrix": exact.astype(np.float16)}
            np.testing.assert_array_equal(
                run_node(library, "PackedMatMul", halves, "matrix"), found
            )
        wide = x.astype(np.float64) @ exact + (bias if width % 2 else 0)
        bound = np.abs(x).astype(np.float64) @ np.abs(exact) + np.abs(bias)
        assert np.all(np.abs(found - wide) <= 1e-6 * bound), (rows, depth, width, storage)
    for size in (1, 7, 352):
        gate_up = (10 * rng.standard_normal((3, 2 * size))).astype(np.float32)
        gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
        found = run_node(library, "GatedSilu", {"gate_up": gate_up})
        np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, 2e-6, 1e-30)
    for images, codes, guided in ((1, 5, True), (3, 1664, True), (2, 33, False)):
        logits = rng.standard_normal(((2 if guided else 1) * images, codes)).astype(np.float32)
        noise = rng.standard_normal((4, images, codes)).astype(np.float32)
        scale, heat = (rng.random(images).astype(np.float32) for _ in range(2))
        step = np.array([6], np.int64)
        inputs = {"logits": logits, "noise": noise, "step": step, "scale": scale, "heat": heat}
        mixed = logits
        if guided:
            with_prompt, without = np.split(logits, 2)
            mixed = without + scale[:, None] * (with_prompt - without)
        wanted = np.argmax(mixed + heat[:, None] * noise[2], axis=1)
        np.testing.assert_array_equal(run_node(library, "DrawToken", inputs), wanted)
    seeds = [ImageSeed(2**63 + 5, 7), ImageSeed(1, 0)]
    for codes in (1, 4, 1023, 1664, 5001):
        native = noise_maker(library)(seeds, codes)(range(570, 574))
        np.testing.assert_array_equal(native, GumbelNoise(seeds, codes)(range(570, 574)))


# Rows, depth, width, and what holds the matrix exactly.
PRODUCTS = [
    (rows, depth, width, storage)
    for storage in ("float16", "bfloat16", "float32")
    for rows, depth, width in ((1, 1, 1), (2, 128, 704), (5, 3, 33), (13, 19, 31), (64, 128, 97))
]


def test_products_gates_draws_and_noise_are_numpys(library: Path) -> None:
    assert noise_maker(library) is not GumbelNoise
    check_single_operators(library)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("matrix", {"matrix": np.zeros((3, 2), np.float32)}),
        ("noise", {"noise": np.zeros((4, 3, 5), np.float32)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    name: str, broken: dict[str, np.ndarray], library: Path
) -> None:
    zeros = {"x": np.zeros((2, 4), np.float32), "matrix": np.zeros((4, 2), np.float32)}
    draw = {
        "logits": np.zeros((2, 5), np.float32),
        "noise": np.zeros((4, 1, 5), np.float32),
        "step": np.zeros(1, np.int64),
        "scale": np.zeros(1, np.float32),
        "heat": np.zeros(1, np.float32),
    }
    given, op_type, constant = (
        (zeros, "PackedMatMul", "matrix") if name == "matrix" else (draw, "DrawToken", "")
    )
    run_node(library, op_type, given, constant)
    with pytest.raises(Exception, match=op_type):
        run_node(library, op_type, given | broken, constant)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PolicyChoice], Path]:
    def export(choice: PolicyChoice) -> Path:
        return export_bundle(choice.export_spec(tmp_path_factory.mktemp("bundle") / "demo"))

    return export


@pytest.mark.parametrize(
    "choice",
    [
        PolicyChoice(),
        PolicyChoice(policy="h2o"),
        PolicyChoice(policy="streaming-llm"),
        PolicyChoice(policy="tova"),
        PolicyChoice(policy="headkv"),
        PolicyChoice(weights="int8"),
        PolicyChoice(weights="int4"),
        PolicyChoice(kv_dtype="int8"),
        PolicyChoice(dtype="fp16"),
        PolicyChoice(dtype="fp16", kv_dtype="int8"),
    ],
    ids=lambda choice: f"{choice.policy}-{choice.dtype}-{choice.weights}-{choice.kv_dtype}",
)
def test_tokens_are_those_of_ordinary_operators(
    choice: PolicyChoice,
    exported: Callable[[PolicyChoice], Path],
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, results = exported(choice), []
    monkeypatch.setattr(ort_operators, "SOURCE_TREE", library.parent)  # there is no build in it
    with ExitStack() as stack:
        for place in (str(library), ""):
            monkeypatch.setenv(LIBRARY_VARIABLE, place)
            opened = ImageGenerator.from_bundle(path, num_threads=1)
            generator = stack.enter_context(opened)
            assert generator.runner.fuses_steps == bool(place)
            has_prefill = "onnx/prefill_fused.onnx" in generator.bundle.files
            assert has_prefill == (choice.weights != "none")  # products of codes pay at many rows
            results.append((generator(CAPTIONS, seed=1).tokens, generator))
        batches = PromptBatches.from_bundle(generator.bundle)
        batch = batches(CAPTIONS, bundle_sampling(generator.bundle), 1)
        assert_same_tokens(*results, batch)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_passes_of_lookahead_keep_the_tokens_of_fused_steps(
    dtype: str,
    exported: Callable[[PolicyChoice], Path],
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes evict by graphs, and have operators for products and gates alone."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    path = exported(PolicyChoice(dtype=dtype))
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        assert "onnx/decode_window_fused.onnx" in generator.bundle.files
        single, ahead = (generator(CAPTIONS, seed=1, lookahead=tokens).tokens for tokens in (1, 6))
        assert generator.passes < 400
        batch = PromptBatches.from_bundle(generator.bundle)(
            CAPTIONS, bundle_sampling(generator.bundle), 1
        )
        assert_same_tokens((single, generator), (ahead, generator), batch)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_verify_compares_its_step_with_the_reference(
    decay: float | None,
    exported: Callable[[PolicyChoice], Path],
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph whose operator forgets scores is found, though the ordinary operators are right."""
    if decay is not None:

        def forgetful(ops: Operators, nodes: Sequence[AttentionNode], *rest: Any) -> Any:
            return layer_attention(ops, [replace(n, score_decay=decay) for n in nodes], *rest)

        monkeypatch.setattr(fused_step, "layer_attention", forgetful)
    path = exported(PolicyChoice(policy="h2o"))
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    report = verify(VerifySpec(path, against="torch", level="logits"))
    *others, last = report["rungs"]
    assert last["name"] == "operators" and "not_run" not in last["figures"]
    assert all(rung["ok"] for rung in others)
    assert last["ok"] == (decay is None), last["first_divergence"]


def test_verify_says_that_products_of_codes_round(
    exported: Callable[[PolicyChoice], Path], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    path = exported(PolicyChoice(weights="int8"))
    report = verify(VerifySpec(path, against="torch", level="logits"))
    assert report["ok"]
    assert "int8 and int4 weights round" in report["rungs"][-1]["figures"]["not_run"]


def test_a_dtype_without_operators_has_no_graphs_of_them(
    exported: Callable[[PolicyChoice], Path],
) -> None:
    assert not list(exported(PolicyChoice(dtype="bf16")).glob("onnx/*_step*_fused.onnx"))
    assert list(exported(PolicyChoice(dtype="fp16")).glob("onnx/*_step*_fused.onnx"))


@pytest.mark.parametrize(
    "content, message",
    [(None, "is no library; build it: make operators"), (b"ELF", "build it again: make operators")],
)
def test_a_library_that_is_asked_for_and_not_there_is_an_error(
    content: bytes | None,
    message: str,
    exported: Callable[[PolicyChoice], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / LIBRARY
    if content is not None:
        place.write_bytes(content)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(place))
    with (
        pytest.raises(UserError, match=message),
        ImageGenerator.from_bundle(exported(PolicyChoice()), num_threads=1) as generator,
    ):
        generator(CAPTIONS[:1])
