"""Quantized weights: what the bundle stores, against numpy; what ONNX Runtime and torch make of it,
against each other.
"""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from ssd_export.bundle import Precision, open_bundle
from ssd_export.bundle.config import HEAD_WEIGHTS, WeightFormat
from ssd_export.export.exporter import export_bundle
from ssd_export.export.journal import Journal
from ssd_export.export.quantize import (
    HEAD_MATRICES,
    QuantizedMatrix,
    block_lines,
    precision_facts,
)
from ssd_export.export.weight_plan import plan_weights
from ssd_export.export.weights import Weight, write_weights
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.load import load_model
from ssd_export.model.quantization import (
    BLOCKS,
    Scheme,
    choose_scheme,
    dequantize,
    quantize,
    to_stored,
)
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.ort_session import session_entries
from ssd_export.runtime.torch_runner import TorchRunner
from ssd_export.runtime.torch_weights import load_modules
from ssd_export.verify.checkpoint_runner import round_matrices
from ssd_export.verify.generation import prompt_batch
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import (
    PROMPTS,
    bundle,
    checkpoint,
    export_spec,
    head_map_file,
    scratch,
)

TINY = TinyJanus(seed=3, num_kv_heads=2)
FORMATS = ("int8", "int4", "fp8")
QUANTIZED = {  # matrices of a step, those of the head included where --weights quantizes it
    weights: 4 * TINY.num_layers + (0 if HEAD_WEIGHTS[weights] == "none" else len(HEAD_MATRICES))
    for weights in FORMATS
}
SCHEMES = [Scheme("int8"), Scheme("fp8"), *(Scheme("int4", block) for block in BLOCKS)]
TRIED = {"int8": (127,), "int4": (7, 7.5, 8, 8.5), "fp8": (448,)}
# of a scale: int4 may clip its greatest to 7 of 8.5; fp8 has steps of 32 below its greatest number,
# 448
MOST = {"int8": 0.5, "int4": 1.5, "fp8": 16.0}


def weights_of(num_outputs: int = 6, num_inputs: int = 256, seed: int = 0) -> np.ndarray:
    """Linear weights [out, in] of uneven rows, one of them zero, one with an outlier."""
    rng = np.random.default_rng(seed)
    weights = (
        rng.standard_normal((num_outputs, num_inputs)) * np.logspace(-3, 0, num_outputs)[:, None]
    )
    weights[0], weights[1, 7] = 0.0, 9.0
    return weights.astype(np.float32)


def numpy_quantized(
    weights: np.ndarray, scheme: Scheme, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales in another way than ours: block after block, every divisor tried, errors in
    float64.
    """
    num_outputs, num_inputs = weights.shape
    block = scheme.block or num_inputs
    codes = np.zeros(weights.shape)
    scales = np.ones((num_outputs, num_inputs // block), dtype)
    for row in range(num_outputs):
        for index in range(num_inputs // block):
            place = slice(index * block, (index + 1) * block)
            tried = [
                numpy_block(weights[row, place], divisor, scheme.format, dtype)
                for divisor in TRIED[scheme.format]
            ]
            _, scales[row, index], codes[row, place] = min(tried, key=lambda each: each[0])
    return codes, scales


def numpy_block(
    part: np.ndarray, divisor: float, format: str, dtype: str
) -> tuple[float, float, np.ndarray]:
    """(squared error, scale, codes) of one block."""
    scale = np.dtype(dtype).type(np.abs(part).max() / np.float32(divisor)) or np.dtype(dtype).type(
        1
    )
    least, greatest = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}[format]
    exact = (part / np.float32(scale)).clip(least, greatest)
    codes = (exact.astype(ml_dtypes.float8_e4m3fn) if format == "fp8" else np.rint(exact)).astype(
        np.float64
    )
    return float(((codes * float(scale) - part) ** 2).sum()), scale, codes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_scales_equal_an_independent_quantizer(scheme: Scheme, dtype: str) -> None:
    weights = weights_of()
    codes, scale = quantize(torch.from_numpy(weights), scheme, getattr(torch, dtype))
    wanted_codes, wanted_scale = numpy_quantized(weights, scheme, dtype)
    np.testing.assert_array_equal(scale.numpy(), wanted_scale)
    np.testing.assert_array_equal(codes.double().numpy(), wanted_codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_matrices_side_by_side_are_stored_as_one_after_the_other(scheme: Scheme) -> None:
    """As if each had been quantized by itself, and the codes joined afterwards."""
    torch.manual_seed(0)
    parts = [torch.randn(rows, 256) for rows in (130, 2, 64)]
    alone = [to_stored(*quantize(part, scheme, torch.float16), scheme) for part in parts]
    sources = [partial(torch.clone, part) for part in parts]
    made = QuantizedMatrix("qkv", (256, 196), sources, scheme, torch.float16)
    for stored, wanted in zip((made.codes(), made.scale()), zip(*alone, strict=True), strict=True):
        assert torch.equal(stored.view(torch.uint8), torch.cat(wanted, -1).view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored_gives_the_weights_back_within_a_step(scheme: Scheme) -> None:
    weights = weights_of()
    stored, scale = to_stored(*quantize(torch.from_numpy(weights), scheme, torch.float32), scheme)
    again = dequantize(stored, scale).T.numpy()
    steps = numpy_quantized(weights, scheme, "float32")[1].repeat(
        scheme.block or weights.shape[1], axis=1
    )
    assert (np.abs(again - weights) <= MOST[scheme.format] * steps * 1.0001).all()
    if scheme.format == "int4":
        inside = (weights > -8.5 * steps) & (weights < 7.5 * steps)
        assert (np.abs(again - weights)[inside] <= 0.5 * steps[inside] * 1.0001).all()
    if scheme.format == "fp8":
        large = np.abs(weights) > steps  # above a scale: four significant bits
        assert (np.abs(again - weights)[large] <= np.abs(weights[large]) / 16 * 1.0001).all()
    assert (again[0] == 0).all(), "a channel of zeros stays zero"


def test_int4_is_packed_as_onnx_packs_it() -> None:
    """Codes -7..7 through the file's bytes into an ONNX tensor and back."""
    codes = (
        torch.arange(-7, 8).repeat(4)[:56].reshape(4, 14).T.contiguous().to(torch.int8)
    )  # [out 14, in 4]
    stored, _ = to_stored(codes, torch.ones(14, 1), Scheme("int4", 4))
    tensor = onnx.TensorProto(
        dims=[4, 14], data_type=onnx.TensorProto.INT4, raw_data=stored.numpy().tobytes()
    )
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(tensor).astype(np.int8), codes.T.numpy()
    )


@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "wanted"),
    [
        (256, [6], 128),
        (128, [6], 128),
        (192, [6], 64),
        (352, [6, 6], 32),
        (48, [2], 16),
        (40, [6], None),
        (256, [5, 5], None),
    ],
)
def test_int4_takes_the_greatest_block_that_divides_the_inputs(
    num_inputs: int, num_outputs: list[int], wanted: int | None
) -> None:
    scheme = choose_scheme("int4", num_inputs, num_outputs)
    assert (scheme and scheme.block) == wanted


def quantized_bundle(weights: str, dtype: str = "fp32", head: str | None = None) -> Path:
    model = checkpoint(TINY)
    return bundle(
        model,
        "ssd-row",
        head_map=str(head_map_file(model)),
        weights=weights,
        dtype=dtype,
        head_weights=head,
    )


@pytest.mark.parametrize("weights", FORMATS)
def test_the_weights_file_counts_its_bytes(weights: str) -> None:
    """Planned, written and stated bytes agree with what the formats say by themselves."""
    path = quantized_bundle(weights, head="none")
    header, tensors = read_header(path / "onnx" / "weights.safetensors")
    layer = {name: entry for name, entry in tensors.items() if name.startswith("layers.")}
    codes = {name: entry for name, entry in layer.items() if not name.endswith(".scale")}
    assert {entry["dtype"] for entry in codes.values()} == {
        {"int8": "I8", "int4": "U8", "fp8": "F8_E4M3"}[weights]
    }
    num_weights = sum(int(np.prod(entry["shape"])) for entry in codes.values()) * (
        2 if weights == "int4" else 1
    )
    wanted = num_weights // (2 if weights == "int4" else 1)
    wanted += 4 * sum(
        int(np.prod(entry["shape"])) for name, entry in layer.items() if name.endswith(".scale")
    )
    facts = open_bundle(path).config.precision
    assert facts.weights == weights and facts.quantized_bytes == wanted
    end = max(entry["data_offsets"][1] for entry in tensors.values())
    assert (path / "onnx" / "weights.safetensors").stat().st_size == header + end
    plain = read_header(quantized_bundle("none") / "onnx" / "weights.safetensors")[1]
    assert {
        name: entry for name, entry in plain.items() if not name.startswith("layers.")
    }.keys() == tensors.keys() - layer.keys()


def read_header(path: Path) -> tuple[int, dict[str, dict[str, object]]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("weights", FORMATS)
def test_graphs_are_valid_onnx(weights: str, dtype: str) -> None:
    for path in sorted((quantized_bundle(weights, dtype) / "onnx").glob("*.onnx")):
        onnx.checker.check_model(str(path))
    model = onnx.load(path.parent / "decode_step.onnx", load_external_data=False)
    found = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
    assert found == QUANTIZED[weights]


@pytest.mark.parametrize("weights", FORMATS)
def test_onnx_runtime_generates_the_same_tokens_as_torch(weights: str) -> None:
    opened = open_bundle(quantized_bundle(weights))
    generated = []
    for runner in (OrtRunner(opened, exact=True), TorchRunner.from_bundle(opened, num_threads=1)):
        with ImageGenerator(opened, runner) as generator:
            generated.append(generator(PROMPTS[:2], seed=7).tokens)
    np.testing.assert_array_equal(*generated)
    assert len(np.unique(generated[0])) > 8


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fast_kernels_stay_close_to_the_exact_ones(weights: str) -> None:
    """They round activations to int8: logits of the prompt move, by less than a tenth of their
    spread.
    """
    opened = open_bundle(quantized_bundle(weights))
    batch = prompt_batch(opened, seed=7)
    runners = OrtRunner(opened, exact=True), OrtRunner(opened)
    for runner in runners:
        runner.prefill(batch)
    exact, fast = (runner.logits() for runner in runners)
    assert 0 < np.abs(fast - exact).max() < 0.1 * np.ptp(exact)


@pytest.mark.parametrize("graph", ["prefill", "decode_step"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_onnx_runtime_reads_the_codes_as_they_are(weights: str, graph: str, tmp_path: Path) -> None:
    """Every DequantizeLinear is fused with its product: no session holds the matrices in float."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = (
        3,
        str(tmp_path / "optimized.onnx"),
    )
    for name, value in session_entries(weights, exact=False).items():
        options.add_session_config_entry(name, value)
    path = quantized_bundle(weights) / "onnx" / f"{graph}.onnx"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = [
        node.op_type
        for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    ]
    assert nodes.count("DequantizeLinear") == 0
    aligner = graph == "prefill"  # embeds no image token
    assert nodes.count("MatMulNBits") == QUANTIZED[weights] - aligner


def test_matrices_without_a_block_keep_their_dtype_and_it_is_said() -> None:
    """No block divides 40 inputs: the bundle says so, and generates the same on both."""
    odd = TinyJanus(seed=3, intermediate_size=40)
    path = bundle(checkpoint(odd), "full", 1.0, weights="int4")
    facts = open_bundle(path).config.precision
    assert facts.kept == tuple(f"layers.{layer}.down" for layer in range(odd.num_layers))
    assert any(
        "not quantized" in line and f"down ({odd.num_layers} layers)" in line
        for line in block_lines(facts)
    )
    assert read_header(path / "onnx" / "weights.safetensors")[1]["layers.0.down"]["dtype"] == "F32"


def test_codes_and_scale_may_be_made_in_any_order() -> None:
    """An export that was interrupted between the two goes on with the second."""
    from ssd_export.policy.make import make_policy

    opened = open_checkpoint(checkpoint(TINY))
    table = make_policy("full", opened.config, budget=1.0, prompt_slots=32)
    planned = partial(plan_weights, opened, table, torch.float32, "int4", "int8")
    forwards = {weight.name: weight.make() for weight in planned()}
    for weight in reversed(planned()):
        assert torch.equal(weight.make(), forwards[weight.name]), weight.name
    weights = plan_weights(opened, table, torch.float32)
    assert precision_facts("none", "none", weights) == Precision()


@pytest.mark.parametrize("head", ["none", "int8", "int4"])
@pytest.mark.parametrize("weights", ["none", "int4"])
def test_the_head_has_a_format_that_may_be_another(
    weights: WeightFormat, head: WeightFormat
) -> None:
    """Stored bytes, what the bundle says, and the tokens: torch's are those of the graphs."""
    path = quantized_bundle(weights, head=head)
    opened = open_bundle(path)
    facts = opened.config.precision
    assert (facts.weights, facts.head) == (weights, head)
    tensors = read_header(path / "onnx" / "weights.safetensors")[1]
    stored = {"none": "F32", "int8": "I8", "int4": "U8"}
    assert {tensors[name]["dtype"] for name in HEAD_MATRICES} == {stored[head]}
    assert tensors["layers.0.qkv"]["dtype"] == stored[weights]
    assert tensors["generation_aligner.fc1"]["dtype"] == "F32"
    drawn = []
    for runner in (OrtRunner(opened, exact=True), TorchRunner.from_bundle(opened, num_threads=1)):
        with ImageGenerator(opened, runner) as generator:
            drawn.append(generator(PROMPTS[:2], seed=7).tokens)
    np.testing.assert_array_equal(*drawn)


def test_a_checkpoint_is_rounded_as_its_bundle_is() -> None:
    """What `verify` compares with: the checkpoint's own modules hold the bundle's numbers."""
    opened = open_bundle(quantized_bundle("int8", head="int4"))
    model = load_model(open_checkpoint(checkpoint(TINY)), "cpu", torch.float32)
    round_matrices(model, opened.config.precision, opened.config.policy)
    stored, _ = load_modules(opened, opened.config.model, "cpu")
    for name in HEAD_MATRICES:
        wanted = stored.get_parameter(f"{name}.weight")
        assert torch.equal(model.get_parameter(f"{name}.weight"), wanted), name


def test_names_of_folders_tell_another_head_apart() -> None:
    assert Precision("int4", HEAD_WEIGHTS["int4"]).name == "int4"
    assert Precision("int4", "none").name == "int4-head-none"
    assert Precision("none", "int8").name == "none-head-int8"
    assert Precision("none", "int8").main_format == "int8"


def test_two_exports_are_the_same_bytes() -> None:
    model = checkpoint(TINY)
    again = export_bundle(
        export_spec(
            model,
            "ssd-row",
            head_map=str(head_map_file(model)),
            weights="int4",
            out=scratch() / "int4-again",
        )
    )
    first = open_bundle(quantized_bundle("int4")).files["onnx/weights.safetensors"]
    assert open_bundle(again).files["onnx/weights.safetensors"] == first


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    """The memory of an export is that of its largest tensor, not of its two largest neighbors."""
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert [one() for one in made] == [None] * len(made)
        tensor = torch.zeros(8, 8)
        made.append(weakref.ref(tensor))
        return tensor

    weights = [Weight(f"w{number}", (8, 8), torch.float32, make) for number in range(3)]
    (tmp_path / "b").mkdir()
    with Journal(tmp_path / "b", {}, resume=False) as journal:
        write_weights(tmp_path / "b" / "w", weights, journal)
    assert len(made) == 3
