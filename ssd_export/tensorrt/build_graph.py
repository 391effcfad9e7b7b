"""One graph of a plan becomes one engine: parsed, its shared weights lifted out, built, and checked
layer by layer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from ssd_export.bundle.hashes import sha256
from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.build_memory import StoredWeight, shared_weights
from ssd_export.tensorrt.build_progress import Phases, Progress, progress_monitor
from ssd_export.tensorrt.builder_config import builder_config, use_timing_cache
from ssd_export.tensorrt.cache_traffic import wasted_traffic
from ssd_export.tensorrt.engine_manifest import EngineEntry
from ssd_export.tensorrt.layer_listing import Layer, hazards, unordered_dependencies
from ssd_export.tensorrt.messages import judge, logger, one_line
from ssd_export.tensorrt.network import check_interface, lift_weights, parse_graph
from ssd_export.tensorrt.plan import DECODE_STEPS, BuildPlan
from ssd_export.tensorrt.plugin import num_plugin_nodes
from ssd_export.tensorrt.step_form import AS_BUNDLED, DECODE_WINDOW, in_place

WITH_SHARED_WEIGHTS = ("prefill", "decode_step", DECODE_WINDOW)  # and those with top-k
PLUGIN_LAYER = "PluginV3"


@dataclass(frozen=True)
class GraphEngine:
    """One engine as engine.json describes it, its file, and the warnings the user should see."""

    entry: EngineEntry
    path: Path
    warnings: list[str]
    library_is_in_engine: bool


@dataclass(frozen=True)
class ReadGraph:
    """A graph as TensorRT's network. parser: the network uses what it owns. weights: those that
    became inputs.
    """

    spec: GraphSpec
    builder: Any
    network: Any
    parser: Any
    weights: dict[str, StoredWeight]
    warnings: list[str]
    num_plugin_layers: int


def build_graph(
    plan: BuildPlan, spec: GraphSpec, scratch: Path, progress: Progress, cancelled: Event
) -> GraphEngine:
    """Builds the engine of a graph and writes it to the scratch folder.

    Raises: UserError for a graph that TensorRT does not take or would take otherwise than it was
    exported, KeyboardInterrupt once `cancelled` is set.
    """
    started = time.monotonic()
    graph = read_graph(plan, spec)
    engine = serialized_engine(plan, graph, scratch, progress, cancelled)
    made = write_engine(plan, graph, engine, scratch)
    return replace(made, entry=replace(made.entry, seconds=round(time.monotonic() - started, 1)))


def read_graph(plan: BuildPlan, spec: GraphSpec) -> ReadGraph:
    """The graph parsed, its shared weights lifted out, checked against its contract."""
    trt = plan.builder_flavor.trt
    log, messages = logger(trt)
    messages.clear()
    source = plan.bundle.file(f"onnx/{spec.name}.onnx").resolve()
    model = plan.step.models.get(spec.name)
    builder, network, parser = parse_graph(trt, log, messages, source, model)
    shared = {}
    if plan.target.shared_weights and spec.name.startswith(WITH_SHARED_WEIGHTS):
        shared = shared_weights(plan.bundle)
    names = lift_weights(trt, network, {name: weight.shape for name, weight in shared.items()})
    lifted = {name: shared[name] for name in names}
    check_interface(spec, network, lifted)
    uses_plugin = plan.step.uses_plugin(spec.name)
    num_plugin_layers = num_plugin_nodes(plan.bundle, spec.name) if uses_plugin else 0
    _check_plugin_layers(spec, _network_layers(trt, network), num_plugin_layers)
    judge(spec.name, messages.warnings)
    return ReadGraph(
        spec, builder, network, parser, lifted, _own_copy(shared, lifted), num_plugin_layers
    )


def serialized_engine(
    plan: BuildPlan, graph: ReadGraph, scratch: Path, progress: Progress, cancelled: Event
) -> Any:
    """The built engine in memory, which supports the buffer protocol."""
    trt = plan.builder_flavor.trt
    _, messages = logger(trt)
    config = builder_config(plan, graph.builder, graph.spec)
    keep_timings = use_timing_cache(plan, config, scratch)
    monitor = progress_monitor(trt, Phases(graph.spec.name, progress, cancelled))
    config.progress_monitor = monitor
    engine = graph.builder.build_serialized_network(graph.network, config)
    if engine is None:
        raise _failure(graph.spec, messages.errors, cancelled)
    judge(graph.spec.name, messages.warnings)
    keep_timings()
    return engine


def write_engine(plan: BuildPlan, graph: ReadGraph, engine: Any, scratch: Path) -> GraphEngine:
    """The engine in a file, its layers as the builder listed them; seconds are the caller's to
    add.
    """
    _, messages = logger(plan.builder_flavor.trt)
    by_profile = messages.layers(len(plan.profiles(graph.spec.name)))
    aliases = _aliases(plan, graph.spec)
    for layers in by_profile:  # some versions do not list them
        kinds = Counter(layer.kind for layer in layers)
        _check_plugin_layers(graph.spec, kinds, graph.num_plugin_layers)
        _check_order(graph.spec, layers, aliases)
    path = scratch / f"{graph.spec.name}.engine"
    path.write_bytes(memoryview(engine))
    warnings = judge(graph.spec.name, messages.warnings) + graph.warnings
    if plan.step.form == AS_BUNDLED and graph.spec.name in DECODE_STEPS and not aliases:
        warnings.append("every cache is copied after each step, and held twice; use --plugin on")
    if graph.spec.name.startswith(DECODE_WINDOW) and not aliases:
        warnings.append("every cache is copied after each pass of lookahead, and held twice")
    if plan.builder_flavor.lists_layers:
        warnings += _unchecked_order(by_profile, aliases)
    if graph.spec.name in plan.step.models and not plan.step.uses_plugin(graph.spec.name):
        # the products of a prompt may be as large as a weight, and no copies of it
        weights = graph.weights if graph.spec.name in DECODE_STEPS else {}
        for layers in by_profile:
            warnings += wasted_traffic(layers, weights)
    layers = by_profile[0] if by_profile else []
    entry = _entry(plan, graph, path, layers, messages.activation_bytes)
    return GraphEngine(entry, path, warnings, messages.library_is_in_engine)


def _aliases(plan: BuildPlan, spec: GraphSpec) -> dict[str, str]:
    return in_place(spec, plan.step.form, plan.builder_flavor.lists_layers)


def _entry(
    plan: BuildPlan,
    graph: ReadGraph,
    path: Path,
    layers: Sequence[Layer],
    activation_bytes: int | None,
) -> EngineEntry:
    """The engine.json entry of one engine. layers: of the first profile."""
    spec = graph.spec
    onnx_name = f"onnx/{spec.name}.onnx"
    return EngineEntry(
        engine=path.name,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        onnx=onnx_name,
        onnx_sha256=plan.bundle.files[onnx_name].sha256,
        layers=dict(sorted(Counter(layer.kind for layer in layers).items())),
        profiles=plan.profiles(spec.name),
        aliases=_aliases(plan, spec),
        weights=graph.weights,
        activation_bytes=activation_bytes,
        seconds=0.0,
    )


def _own_copy(shared: Mapping[str, StoredWeight], lifted: Mapping[str, StoredWeight]) -> list[str]:
    """A warning where the parser gave layers' matrices other names, so that they stayed in the
    engine.
    """
    left = [name for name in shared if name.startswith("layers.") and name not in lifted]
    return (
        [f"{len(left)} weights stay in this engine: the device holds a second copy of them"]
        if left
        else []
    )


def _network_layers(trt: Any, network: Any) -> Counter[str]:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return Counter({PLUGIN_LAYER: kinds.count(trt.LayerType.PLUGIN_V3)})


def _check_plugin_layers(spec: GraphSpec, layers: Counter[str], wanted: int) -> None:
    """One layer of the plugin for each attention node in the plugin flavor, none in the plain
    one.
    """
    if layers[PLUGIN_LAYER] != wanted:
        raise UserError(
            f"{spec.name} has {layers[PLUGIN_LAYER]} plugin layers where {wanted} were expected;"
            " use --plugin off"
            if wanted
            else (
                f"{spec.name} is built of plain operators and has {layers[PLUGIN_LAYER]} plugin"
                " layers; export the bundle again"
            )
        )


def _check_order(spec: GraphSpec, layers: Sequence[Layer], aliases: Mapping[str, str]) -> None:
    """Every reader of a buffer has to end before it is overwritten."""
    own = [layer for layer in layers if layer.kind != PLUGIN_LAYER]  # its kernel orders by itself
    found = hazards(own, aliases)
    if found:
        raise UserError(
            f"the engine of {spec.name} would overwrite what it still reads ({found[0]}); use"
            " another version of TensorRT, or --plugin on"
        )


def _unchecked_order(
    by_profile: Sequence[Sequence[Layer]], aliases: Mapping[str, str]
) -> list[str]:
    """A warning where buffers are overwritten and the builder's listing does not say in what order:
    it lists kinds alone, or as this version does not understand.
    """
    reasons = [
        f"no layer is listed that writes {output}"
        for output in aliases
        if not any(layer.writes(output) for layers in by_profile for layer in layers)
    ]
    for layers in by_profile:
        reasons += unordered_dependencies(layers)
    if not reasons:
        return []
    return [
        f"not checked that caches are read before they are overwritten ({reasons[0]}): compare this"
        " engine's images with ssd-export verify --against trt"
    ]


def _failure(spec: GraphSpec, errors: list[str], cancelled: Event) -> BaseException:
    if cancelled.is_set():
        return KeyboardInterrupt()
    reason = one_line(errors[0]) if errors else "it gave no reason"
    return UserError(
        f"TensorRT could not build {spec.name} ({reason}); try --plugin off, a smaller --batch or a"
        " larger --workspace"
    )
