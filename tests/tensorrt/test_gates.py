"""Every check of a finished engine fails on what it is there for, and says which layer it is.

Each test breaks a small decode step in one way, as it once was broken or as a compiler could break
it, and builds it with TensorRT-RTX, which needs no GPU. The checks over the shape of Janus-Pro are
in test_real_shape.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import onnx_ir as ir
import pytest

from ssd_export.errors import UserError
from ssd_export.export import kv_update, prefill_caches
from ssd_export.export.functions import AttentionNode
from ssd_export.export.operators import Operators
from ssd_export.tensorrt import build_graph as module
from ssd_export.tensorrt import build_memory, builder_config
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build_graph import GraphEngine, build_graph, read_graph
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.layer_listing import Layer, unordered_dependencies
from ssd_export.tensorrt.messages import Messages, logger
from ssd_export.tensorrt.plan import BuildPlan, BuildSpec, StepPlan, plan_build
from ssd_export.tensorrt.profiles import Profile
from ssd_export.tensorrt.step_form import AS_BUNDLED, KV_UPDATE
from ssd_export.tensorrt.target import Batch
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
    ),
]
ONE_LAYER = TinyJanus(num_layers=1, num_heads=2, num_kv_heads=2, seed=3)
ONE_IMAGE = Batch(1, 1, 1)
LAYER = r"__myl_\w+_myl0_\d+"  # how TensorRT-RTX names a kernel
Attend = Callable[..., ir.Value]


@pytest.fixture(scope="module")
def path() -> Path:
    """Two head groups, of which one evicts a grid row at a time: an evict graph is there."""
    model = checkpoint(ONE_LAYER)
    return bundle(model, "ssd-row", 0.2, head_map=str(head_map_file(model)), dtype="fp16")


def plan(path: Path, batch: Batch = ONE_IMAGE, **options: object) -> BuildPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_plan, "gpu_here", lambda: None)
        return plan_build(BuildSpec(path, "ada", plugin="off", batch=batch, **options))


def build(made: BuildPlan, graph: str, folder: Path) -> GraphEngine:
    spec = next(spec for spec in made.graphs if spec.name == graph)
    return build_graph(made, spec, folder, lambda *told: None, Event())


def test_the_step_as_it_is_has_no_fault(path: Path, tmp_path: Path) -> None:
    made = plan(path)
    assert made.step.form == KV_UPDATE
    for graph in ("prefill", "decode_step", "evict"):
        assert build(made, graph, tmp_path).warnings == []
        (layers,) = logger(made.flavor.trt)[1].layers(1)
        assert unordered_dependencies(layers) == []


@pytest.mark.parametrize("graph", ["evict", "decode_step"])
def test_positions_in_place_are_refused_where_one_kernel_ranks_and_overwrites_them(
    graph: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the graph's contract aliases, as ONNX Runtime may share it."""
    monkeypatch.setattr(module, "in_place", lambda spec, *others: spec.aliases)
    said = (
        rf"{graph} would overwrite what it still reads \({LAYER} reads"
        r" past_key_values\.0\.\d\.position and overwrites it in the same kernel\)"
    )
    with pytest.raises(UserError, match=said):
        build(plan(path), graph, tmp_path)


def test_caches_copied_by_the_bundle_s_form_are_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ScatterND with K @ q, taken for the form that copies nothing."""
    made = plan(path)
    models = {"decode_step": made.bundle.file("onnx/decode_step.onnx").read_bytes()}
    monkeypatch.setattr(builder_config, "engine_spec", lambda spec, form: spec)
    taken = replace(made, step=replace(made.step, models=models))
    told = build(taken, "decode_step", tmp_path).warnings
    for part in ("key", "value"):
        assert told_of(told, rf"__myl_Move_myl0_\d+ copies past_key_values\.0\.0\.{part}")
    twice = rf"past_key_values\.0\.1\.value is read 2 times, by {LAYER}, {LAYER}"
    assert told_of(told, twice)


def told_of(warnings: list[str], said: str) -> bool:
    return any(re.fullmatch(said, warning) for warning in warnings)


def test_a_prefill_that_reads_the_caches_it_overwrites_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's rows before the other slots, by ordinary operators."""

    def joined(ops: Operators, cache: ir.Value, rows: ir.Value, *others: object) -> ir.Value:
        start, slots = (ops.op("Shape", value, start=2, end=3) for value in (rows, cache))
        end = ops.op("Slice", cache, start, slots, ops.constant([2]))
        update = ops.op("Reshape", rows, ops.constant([2, 1, -1, ONE_LAYER.head_dim]))
        return ops.op("Concat", update, end, axis=2)

    monkeypatch.setattr(prefill_caches, "_written", joined)
    said = r"prefill would overwrite what it still reads \(.* reads past_key_values\.0\.\d\.\w+"
    with pytest.raises(UserError, match=said):
        build(plan(path), "prefill", tmp_path)


def _k_at_q(ops: Operators, node: AttentionNode, *inputs: ir.Value) -> ir.Value:
    """The keys times the query, as ONNX Runtime's form has it."""
    query, key, empty = inputs
    column = ops.reshape(query, [-1, 1, node.head_dim, node.query_group_size])
    wide = [kv_update._wide(ops, node, part) for part in (key, column)]
    logits = ops.op("Transpose", ops.op("MatMul", *wide), perm=[0, 3, 2, 1])
    mask = ops.reshape(empty, [-1, 1, node.num_slots, 1])
    lowest = ops.constant(-kv_update.PROTECTED, "float32")
    return ops.op("Softmax", ops.op("Where", mask, lowest, logits), axis=2)


def test_keys_reordered_for_a_product_are_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_update, "_probabilities", _k_at_q)
    told = build(plan(path), "decode_step", tmp_path).warnings
    assert told_of(told, rf"{LAYER} copies present\.0\.0\.key"), told


def test_a_second_reading_of_the_values_is_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted: Attend = kv_update._weighted_values

    def scaled(ops: Operators, node: AttentionNode, probs: ir.Value, value: ir.Value) -> ir.Value:
        greatest = ops.op("ReduceMax", value, ops.constant([1, 2, 3]), keepdims=1)
        out = weighted(ops, node, probs, value)
        return ops.op("Mul", out, ops.reshape(greatest, [-1, 1, 1]))

    monkeypatch.setattr(kv_update, "_weighted_values", scaled)
    told = build(plan(path), "decode_step", tmp_path).warnings
    said = rf"past_key_values\.0\.0\.value is read 2 times, by {LAYER}, {LAYER}"
    assert told_of(told, said), told


def test_weights_copied_before_every_product_are_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices of the decode step alone, which TensorRT-RTX copies where they are inputs."""
    monkeypatch.setattr(build_memory, "OF_ONE_GRAPH", ())
    told = build(plan(path), "decode_step", tmp_path).warnings
    assert told_of(told, rf"{LAYER} copies generation_aligner\.fc1"), told


def test_one_profile_for_all_graphs_asks_for_more_than_the_workspace(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range of images up to the batch, as every graph once had it."""
    made = plan(path, Batch(1, 1, 64), workspace_mib=16)
    made = replace(made, target=replace(made.target, decoder_images=1))
    assert build(made, "image_decoder", tmp_path).warnings == []
    whole = Profile((1, 1, 64), (made.prompt_slots,) * 3)
    monkeypatch.setattr(BuildPlan, "profiles", lambda self, graph: (whole,))
    with pytest.raises(
        UserError, match=r"could not build image_decoder .*OutOfMemory.*--workspace"
    ):
        build(made, "image_decoder", tmp_path)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (lambda layers: [], r"no layer is listed that writes present\.0\.0\.key"),
        (
            lambda layers: [replace(layer, stream=place) for place, layer in enumerate(layers)],
            rf"{LAYER} reads \S+ of {LAYER}",
        ),
    ],
    ids=["kinds alone", "streams without signals"],
)
def test_a_listing_that_is_not_understood_is_told(
    listed: Callable[[list[Layer]], list[Layer]],
    said: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    understood = Messages.layers
    monkeypatch.setattr(
        Messages, "layers", lambda self, count: [listed(one) for one in understood(self, count)]
    )
    monkeypatch.setattr(module, "_check_order", lambda *arguments: None)
    told = build(plan(path), "decode_step", tmp_path).warnings
    order = r"not checked that caches are read before they are overwritten \("
    assert told_of(told, order + said + r"\): compare this engine's images with .* --against trt")


def test_a_graph_with_other_outputs_than_its_contract_is_a_bug(path: Path) -> None:
    made = plan(path)
    spec = next(spec for spec in made.graphs if spec.name == "decode_step")
    *others, last = spec.outputs
    with pytest.raises(ValueError, match=rf"decode_step: .* outputs differ .* \['{last.name}'\]"):
        read_graph(made, replace(spec, outputs=tuple(others)))


@pytest.mark.parametrize("lists_layers", [True, False])
def test_the_bundle_s_form_shares_no_cache_where_nothing_shows_that_it_may(
    lists_layers: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT is told of no alias here and lists no layers: it may overwrite what it reads."""
    made = replace(plan(path), step=StepPlan(AS_BUNDLED))
    monkeypatch.setattr(Flavor, "lists_layers", property(lambda self: lists_layers))
    engine = build(made, "decode_step", tmp_path)
    assert bool(engine.entry.aliases) == lists_layers
    assert any("copied after each step" in text for text in engine.warnings) != lists_layers
