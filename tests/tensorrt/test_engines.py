"""Engines of a small random checkpoint, built with TensorRT-RTX on the CPU: plain operators and,
where it compiles, the plugin.

Needs `pip install ssd-export[rtx]`; the plugin also needs what tests/plugins needs. No engine is
run: that takes a GPU.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import onnx
import pytest
from onnx import TensorProto, helper

from ssd_export.bundle import Precision, open_bundle
from ssd_export.errors import UserError
from ssd_export.export.functions import DOMAIN, OP_TYPE
from ssd_export.export.plugin_flavor import SETTLE, STEP, WINDOW
from ssd_export.plan.lookahead import OFF
from ssd_export.tensorrt import build as engine
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build import build_engines, prepare
from ssd_export.tensorrt.build_graph import build_graph
from ssd_export.tensorrt.build_memory import shared_weights, stored_weights, weights_file
from ssd_export.tensorrt.engine_manifest import read_engines
from ssd_export.tensorrt.flavors import load_flavor
from ssd_export.tensorrt.messages import judge, logger
from ssd_export.tensorrt.network import parse_graph
from ssd_export.tensorrt.plan import BuildSpec, plan_build
from ssd_export.tensorrt.plugin import (
    LIBRARY_VARIABLE,
    PLUGIN_NAMES,
    STEP_VERSION,
    WINDOW_VERSION,
    check_prepared,
    num_attention_nodes,
    plugin_graph,
    prepared_name,
)
from ssd_export.tensorrt.step_form import KV_UPDATE
from ssd_export.tensorrt.target import Batch, gpu_here
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file
from tests.tensorrt.kernels import write_kernels

PLUGINS = Path(__file__).parents[2] / "plugins"
TINY = TinyJanus(seed=3, num_kv_heads=2)
NEEDS_RTX = "needs TensorRT-RTX: pip install ssd-export[rtx]"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason=NEEDS_RTX),
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same engines on every machine."""
    monkeypatch.setattr(build_plan, "gpu_here", lambda: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of a float16 bundle with two head groups a layer and an evict graph."""
    model = checkpoint(TINY)
    whole = bundle(model, "ssd-row", head_map=str(head_map_file(model)), dtype="fp16")
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake and a C++ compiler")
    folder = tmp_path_factory.mktemp("plugin")
    command = ["cmake", "-S", str(PLUGINS), "-B", str(folder)]
    configured = subprocess.run(command, capture_output=True, text=True, check=False)
    if configured.returncode:
        pytest.skip(
            re.sub(r".*\(message\): | Call Stack.*", "", " ".join(configured.stderr.split()))
        )
    subprocess.run(["cmake", "--build", str(folder)], capture_output=True, check=True)
    return folder / "libssd_export_plugin.so"


def spec(path: Path, **changes: object) -> BuildSpec:
    values = dict(
        bundle=path,
        target="rtx",
        flavor="auto",
        plugin="off",
        batch=Batch(1, 1, 2),
        workspace_mib=None,
        timing_cache=None,
    )
    return BuildSpec(**{**values, **changes})


def test_plain_engines_are_built_with_one_copy_of_the_weights(path: Path) -> None:
    before = open_bundle(path).hash
    told: list[str] = []
    plan = plan_build(spec(path, lookahead=OFF))
    values = build_engines(plan, lambda stage, done, total: told.append(stage))
    after = open_bundle(path)  # every file is there as the manifest says
    assert after.hash == before == values.bundle_hash
    assert read_engines(after) == {plan.folder: values}
    assert set(values.graphs) == {"prefill", "decode_step", "evict", "image_decoder"}
    assert values.plugin is None and values.warnings == () and values.flags.strongly_typed
    assert (values.batch, values.prompt_slots) == ((1, 1, 2), 32)
    profiles = {
        name: [profile.images for profile in graph.profiles]
        for name, graph in values.graphs.items()
    }
    apart = [(1, 1, 1), (2, 2, 2)]
    assert profiles == {
        "prefill": [(1, 1, 2)],
        "decode_step": apart,
        "evict": [(1, 1, 2)],
        "image_decoder": apart,
    }
    for graph in values.graphs.values():
        assert sum(graph.layers.values()) > 0 and "PluginV3" not in graph.layers
    caches = values.graphs["decode_step"].aliases
    assert caches and {name.rsplit(".")[-1] for name in caches} == {"key", "value"}
    in_place = {name: graph.aliases for name, graph in values.graphs.items() if graph.aliases}
    assert in_place == {"prefill": caches, "decode_step": caches}
    matrices = {name for name in values.graphs["prefill"].weights if name.startswith("layers.")}
    assert len(matrices) == 4 * TINY.num_layers
    assert matrices < set(values.graphs["decode_step"].weights)
    assert not list(path.glob(".building-*")) and not list(path.glob(".adding-*"))


@pytest.mark.parametrize("graph", ["prefill", "decode_step"])
def test_engines_hold_no_copy_of_what_they_share(path: Path, tmp_path: Path, graph: str) -> None:
    """A row of each matrix is looked for in the engine's bytes: there only where the weights are
    not shared.
    """
    plan = plan_build(spec(path, target="ada"))
    data = (path / weights_file(plan.bundle)).read_bytes()
    rows = {name: data[w.offset : w.offset + 64] for name, w in shared_weights(plan.bundle).items()}
    contract = next(contract for contract in plan.graphs if contract.name == graph)

    def inside(shared: bool) -> set[str]:
        chosen = replace(plan, target=replace(plan.target, shared_weights=shared))
        made = build_graph(chosen, contract, tmp_path, lambda stage, done, total: None, Event())
        assert bool(made.entry.weights) == shared
        engine = made.path.read_bytes()
        return {name for name, row in rows.items() if row in engine}

    assert inside(shared=True) == set()
    assert {
        f"layers.{layer}.{part}" for layer in range(2) for part in ("qkv", "o", "gate_up", "down")
    } <= inside(False)


def test_weights_are_where_engine_json_says(path: Path) -> None:
    from safetensors.numpy import load_file

    plan = plan_build(spec(path))
    weights = stored_weights(plan.bundle)
    data = (path / weights_file(plan.bundle)).read_bytes()
    for name, array in load_file(path / weights_file(plan.bundle)).items():
        place = weights[name]
        assert data[place.offset : place.offset + place.num_bytes] == array.tobytes()
        assert (place.dtype, place.shape) == (str(array.dtype), array.shape)


def test_every_attention_becomes_one_plugin_layer(
    path: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    monkeypatch.setenv(
        "SSD_EXPORT_KERNELS",
        str(write_kernels(tmp_path / "kernels", targets=(75, 80), head_dim=TINY.head_dim)),
    )
    values = build_engines(plan_build(spec(path, plugin="on", lookahead=8)))
    step, window = values.graphs["decode_step"], values.graphs["decode_window"]
    caches = list(step.aliases)
    assert set(values.graphs) == {
        "prefill",
        "decode_step",
        "decode_window",
        "image_decoder",
    }, "the kernel evicts by itself"
    assert (
        step.layers["PluginV3"] == values.plugin.num_nodes == num_attention_nodes(open_bundle(path))
    )
    assert window.layers["PluginV3"] == 2 * values.plugin.num_nodes
    assert window.aliases == step.aliases and values.warnings == ()
    assert values.plugin.in_engine and values.flags.host_code and values.flags.aliased_plugin_io
    assert caches and all(
        name.startswith("present.") and step.aliases[name] == f"past_key_values{name[7:]}"
        for name in caches
    )


def test_without_library_or_kernel_auto_says_why_and_on_refuses(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "nowhere.so"))
    plan = plan_build(spec(path, plugin="auto"))
    assert plan.step.form == KV_UPDATE and "nowhere.so" in plan.step.why_not
    with pytest.raises(UserError, match="no plugin library at .*nowhere.so; build it: cmake"):
        plan_build(spec(path, plugin="on"))
    (tmp_path / "nowhere.so").touch()
    monkeypatch.setenv(
        "SSD_EXPORT_KERNELS", str(write_kernels(tmp_path, targets=(80,), head_dim=999))
    )
    with pytest.raises(UserError, match="no kernel image for sm.* head_dim 16"):
        plan_build(spec(path, plugin="on"))


def test_a_board_s_decode_step_is_prepared_here(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.setenv(
        "SSD_EXPORT_KERNELS",
        str(write_kernels(tmp_path / "kernels", targets=(87,), head_dim=TINY.head_dim)),
    )
    plan = plan_build(spec(path, target="jetson-orin", plugin="auto", lookahead=OFF))
    assert plan.flavor is None
    assert prepare(plan) == [prepared_name("decode_step", 87)]
    after = open_bundle(path)
    model = onnx.load(after.file(prepared_name("decode_step", 87)), load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {OP_TYPE} <= {*PLUGIN_NAMES} and len(
        nodes
    ) == num_attention_nodes(after)
    assert not model.functions
    for node in nodes:  # JetPack 6.2's parser looks for a plugin's namespace here alone
        texts = {a.name: a.s.decode() for a in node.attribute if a.type == a.STRING}
        assert texts["plugin_namespace"] == DOMAIN and texts["plugin_version"] == STEP.version
    with_window = plan_build(spec(path, target="jetson-orin", plugin="auto", lookahead=8))
    names = [prepared_name(name, 87) for name in ("decode_step", "decode_window")]
    assert prepare(with_window) == names
    window = onnx.load(open_bundle(path).file(names[1]), load_external_data=False)
    nodes = [node for node in window.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {*PLUGIN_NAMES} - {OP_TYPE}
    assert len(nodes) == 2 * num_attention_nodes(after)
    monkeypatch.setenv("SSD_EXPORT_KERNELS", str(tmp_path / "nowhere"))
    assert (
        plugin_graph(after, "decode_step", (87,))
        == after.file(prepared_name("decode_step", 87)).read_bytes()
    ), "the board needs no kernels"
    with pytest.raises(UserError, match="copy the bundle there and run"):
        plan_build(spec(path, target="jetson-orin", plugin="off"))
    assert (STEP.version, WINDOW.version, SETTLE.version) == (
        STEP_VERSION,
        WINDOW_VERSION,
        WINDOW_VERSION,
    )
    assert_an_older_version_is_refused(path)


def assert_an_older_version_is_refused(path: Path) -> None:
    """Of the decode step that was prepared for sm_87."""
    after, name = open_bundle(path), prepared_name("decode_step", 87)
    for graph in ("decode_step", "decode_window"):
        check_prepared(after, graph, (87,))
    model = onnx.load(after.file(name), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "plugin_version":
                attribute.s = b"3"
    older = after.add_files({name: model.SerializeToString()}, instead_of=[name])
    said = (
        rf"{name} was prepared for version 3 of the plugin's node, and this ssd-export has version"
        rf" {STEP_VERSION}; .* build-engine --bundle DIR --target jetson-orin again"
    )
    flavor = load_flavor("tensorrt-rtx")
    for asked in ("on", "auto"):
        choice = spec(path, plugin=asked)
        with pytest.raises(UserError, match=said):
            build_plan._plan_step(choice, older, flavor, (87,), False, lambda: None)


BOARD = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "onnxruntime", "safetensors",
                                  "tokenizers", "PIL", "triton"}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from threading import Event
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt import build as engine
from ssd_export.tensorrt.build_graph import build_graph
build_plan.gpu_here = lambda: None
plan = build_plan.plan_build(build_plan.BuildSpec(Path(sys.argv[1]), "ada"))
assert plan.step.form == "as bundled" and "pip install onnx-ir" in plan.step.why_not
assert not plan.step.models and "pip install onnx-ir" in plan.step.why_copies
decoder = next(spec for spec in plan.graphs if spec.name == "image_decoder")
print(build_graph(plan, decoder, Path(sys.argv[2]), lambda *told: None, Event()).entry.bytes)
"""


def test_a_board_needs_none_of_the_exporter_s_packages(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BOARD, str(path), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PLUGINS.parent)
    assert run.returncode == 0 and int(run.stdout) > 0, run.stderr


def test_cancelling_leaves_the_bundle_as_it_was(path: Path) -> None:
    before = sorted(file.relative_to(path) for file in path.rglob("*"))

    plan, cancelled = plan_build(spec(path)), Event()
    cancelled.set()
    with pytest.raises(KeyboardInterrupt):
        build_graph(plan, plan.graphs[0], path, lambda stage, done, total: None, cancelled)
    assert sorted(file.relative_to(path) for file in path.rglob("*")) == before


def test_too_little_memory_is_refused_before_the_work(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "free_bytes", lambda: 100 << 20)
    with pytest.raises(UserError, match="100 MiB are free"):
        build_engines(plan_build(spec(path)))
    assert not (path / "engines").exists()


def test_a_full_disk_is_one_line_and_leaves_the_bundle(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(path.rglob("*"))
    plan = plan_build(spec(path))
    monkeypatch.setattr(engine, "build_graph", full)
    with pytest.raises(UserError, match="no space left to write .*; free some"):
        build_engines(plan)
    assert sorted(path.rglob("*")) == before


def test_force_memory_builds_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "free_bytes", lambda: 100 << 20)
    monkeypatch.setattr(build_plan, "GRAPHS", ("image_decoder",))
    assert (
        build_engines(plan_build(spec(path, force_memory=True))).graphs["image_decoder"].bytes > 0
    )


def test_quantized_matrices_stay_in_the_engine_and_the_others_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inputs they would be written out in fp16 before every product."""
    monkeypatch.setattr(build_plan, "GRAPHS", ("decode_step",))
    for head, is_shared in (("none", True), ("int8", False)):
        whole = bundle(
            checkpoint(TINY), "streaming-llm", dtype="fp16", weights="int4", head_weights=head
        )
        path = shutil.copytree(whole, tmp_path / head)
        values = build_engines(plan_build(spec(path, target="ada")))
        inputs = set(values.graphs["decode_step"].weights)
        assert ("generation_head.vision_head" in inputs) == is_shared and values.warnings == ()
        assert not [name for name in inputs if name.startswith("layers.")]


def test_gpus_without_fp8_are_left_out_or_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_build(spec(path)).capabilities == (86, 89, 120)
    bundle = open_bundle(path)
    fp8 = replace(bundle, config=replace(bundle.config, precision=Precision("fp8")))
    monkeypatch.setattr(build_plan, "open_bundle", lambda path: fp8)
    assert plan_build(spec(path)).capabilities == (89, 120)
    with pytest.raises(
        UserError, match="has no fp8, .* --weights int8 or int4, or use --target ada or "
    ):
        plan_build(spec(path, target="ampere"))


@pytest.mark.skipif(
    find_spec("tensorrt") is None or gpu_here() is None,
    reason="needs TensorRT 10.3 or newer and a GPU: building with TensorRT itself was not run",
)
def test_tensorrt_builds_for_the_gpu_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "gpu_here", gpu_here)
    values = build_engines(plan_build(spec(path, target="auto", flavor="tensorrt")))
    assert values.compute_capabilities == (gpu_here(),) and values.warnings == ()
    assert any(name.endswith("/timing.cache") for name in open_bundle(path).files)


def test_an_input_that_the_parser_ignores_fails_the_build(tmp_path: Path) -> None:
    """ONNX Attention-24's nonpad_kv_seqlen: parsed, built, ignored, with no more than a warning of
    the builder.
    """
    names = ("query", "key", "value")
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, (1, 4, 8, 64)) for name in names
    ]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, (1,)))
    node = helper.make_node("Attention", [*names, "", "", "", "lengths"], ["out"])
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT16, (1, 4, 8, 64))
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "attention.onnx")
    trt = load_flavor("tensorrt-rtx").trt
    log, messages = logger(trt)
    messages.clear()
    builder, network, parser = parse_graph(trt, log, messages, tmp_path / "attention.onnx", None)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    assert builder.build_serialized_network(network, config) is not None
    with pytest.raises(UserError, match="Unused Input: lengths"):
        judge("attention", messages.warnings)


def test_a_graph_that_does_not_parse_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    trt = load_flavor("tensorrt-rtx").trt
    log, messages = logger(trt)
    messages.clear()
    with pytest.raises(UserError, match="TensorRT cannot read .*bad.onnx") as refused:
        parse_graph(trt, log, messages, tmp_path / "bad.onnx", None)
    assert "\n" not in str(refused.value)
