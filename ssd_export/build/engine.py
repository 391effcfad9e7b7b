"""build-engine: a plan that is checked before any work, then one engine for each graph, added to the bundle at once.

Built: prefill, decode_step, image_decoder, and evict where the policy has it and the plugin, whose kernel releases by
itself (R7), is not used. The variants with top_k are not built.

One copy of the weights on the device: their matrices are inputs of prefill and decode_step, so that both engines are
given the same buffers (each copied once to an address that is a multiple of 256, which TensorRT asks of inputs).
Measured with TensorRT-RTX 1.7.1, fp16: the decode step has the same 145 layers of the same kinds either way (demo model;
76 KB of constants in place of 3.0 MB), the same 890 in the shape of Janus-Pro-1B, where the builder's peak falls from 6.1
to 0.6 GB and the engine is 6 MB. The other way, both graphs in one network with common initializers, keeps 4.6 MB
where one copy is 3.0 MB, and would run both at every call. Whether a product with a constant matrix is faster on a GPU
was not measured: none was at hand; `shared_weights = false` in a recipe puts them back.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from ssd_export.build import provenance
from ssd_export.build.build_progress import Phases, Progress, progress_monitor
from ssd_export.build.flavours import Flavour, is_installed, load_flavour, missing
from ssd_export.build.interruptible import run_interruptible
from ssd_export.build.memory import (
    check_memory,
    free_bytes,
    is_shared,
    needed_bytes,
    stored_weights,
    weights_file,
)
from ssd_export.build.messages import judge, logger, one_line
from ssd_export.build.network import Profile, check_interface, lift_weights, optimization_profile, parse_graph
from ssd_export.build.plugin import (
    GRAPH,
    file_sha256,
    find_library,
    load_library,
    make_plugin_graph,
    num_attention_nodes,
    plugin_graph,
    prepared_name,
)
from ssd_export.build.targets import AUTO, Batch, Target, choose_flavour, choose_target, gpu_here
from ssd_export.bundle import TOOL_VERSION, Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.specs import GraphSpec

GRAPHS = ("prefill", "decode_step", "evict", "image_decoder")
WITH_SHARED_WEIGHTS = ("prefill", "decode_step")
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class BuildSpec:
    """What is asked for, as build-engine's options say it; None leaves a number to the target's recipe."""

    bundle: Path
    target: str
    flavour: str
    plugin: str
    batch: Batch | None
    workspace_mib: int | None
    timing_cache: Path | None


@dataclass(frozen=True)
class Plugin:
    """library: None where the plugin is not used, because why_not."""

    library: Path | None
    model: bytes | None
    why_not: str


@dataclass(frozen=True)
class BuildPlan:
    """What will be built, settled and checked. flavour: None where this machine can only prepare (see prepare)."""

    bundle: Bundle
    target: Target
    flavour: Flavour | None
    capabilities: tuple[int, ...]
    plugin: Plugin
    batch: Batch
    profile: Profile
    workspace_mib: int
    timing_cache: Path | None
    needed_bytes: int
    free_bytes: int | None

    @property
    def folder(self) -> str:
        """Where the engines will stand in the bundle."""
        assert self.flavour is not None
        return provenance.folder_name(self.flavour.name, self.flavour.version, self.capabilities)

    @property
    def graphs(self) -> list[GraphSpec]:
        contracts = self.bundle.config["graphs"]
        names = [
            name for name in GRAPHS if name in contracts and not (name == "evict" and self.plugin.library)
        ]
        return [GraphSpec.from_dict(contracts[name]) for name in names]


@dataclass(frozen=True)
class BuiltGraph:
    """One engine as engine.json describes it, its file, and the warnings the user should see."""

    description: dict[str, Any]
    path: Path
    warnings: list[str]
    library_is_in_engine: bool


def plan_build(spec: BuildSpec) -> BuildPlan:
    """Everything that can be known before the work.

    Raises: UserError for a bundle, target, flavour, plugin or batch that will not do, or too little memory.
    """
    bundle, gpu = open_bundle(spec.bundle), gpu_here()
    target = choose_target(spec.target, gpu)
    flavour, capabilities = _choose(spec.flavour, target, gpu)
    if flavour is None and spec.plugin == "off":
        raise UserError(
            f"TensorRT builds for {target.title} on that machine itself: copy the bundle there and run ssd-export "
            f"build-engine --bundle DIR --target {target.name} --plugin off"
        )
    plugin = _plan_plugin(spec.plugin, bundle, capabilities) if flavour else Plugin(None, None, "")
    batch = spec.batch or target.batch
    workspace_mib = spec.workspace_mib or target.workspace_mib
    needed = needed_bytes(bundle, target, flavour) if flavour else 0
    return BuildPlan(
        bundle=bundle,
        target=target,
        flavour=flavour,
        capabilities=capabilities,
        plugin=plugin,
        batch=batch,
        profile=Profile.of(batch, bundle.config["policy"]["prompt_slots"]),
        workspace_mib=workspace_mib,
        timing_cache=spec.timing_cache,
        needed_bytes=needed,
        free_bytes=free_bytes(),
    )


def _choose(asked: str, target: Target, gpu: int | None) -> tuple[Flavour | None, tuple[int, ...]]:
    """The flavour to build with and the GPUs to build for; no flavour where only another machine can build."""
    on_this_gpu = gpu in target.compute_capabilities
    if asked == AUTO and not on_this_gpu:
        if "tensorrt-rtx" not in target.flavours:
            return None, target.compute_capabilities
        asked = "tensorrt-rtx"  # the one flavour that builds for a GPU that is not here
    name = choose_flavour(asked, target)
    if not is_installed(name):
        raise UserError(missing([name]))
    if name == "tensorrt" and not on_this_gpu:
        return None, target.compute_capabilities
    flavour = load_flavour(name)
    if not flavour.builds_anywhere:
        return flavour, (gpu,)
    capabilities = tuple(
        capability for capability in target.compute_capabilities if flavour.accepts(capability)
    )
    if not capabilities:
        raise UserError(
            f"{name} {flavour.version} does not build for {target.title}; use --flavour tensorrt on that machine"
        )
    return flavour, capabilities


def _plan_plugin(asked: str, bundle: Bundle, capabilities: tuple[int, ...]) -> Plugin:
    """The plugin's library and graph; for `auto` without it where something is missing, and what that is."""
    if asked == "off":
        return Plugin(None, None, "--plugin off")
    try:
        library = find_library()
        return Plugin(library, plugin_graph(bundle, capabilities), "")
    except UserError as error:
        if asked == "on":
            raise
        return Plugin(None, None, str(error))


def prepare(plan: BuildPlan) -> list[str]:
    """Adds to the bundle what a board lacks to build with the plugin: the decode step with the kernel inside.

    Returns the files' names. Raises: UserError where there are no kernels for the target.
    """
    files = {
        prepared_name(capability): make_plugin_graph(plan.bundle, (capability,))
        for capability in plan.capabilities
    }
    plan.bundle.add_files(files)
    return list(files)


def build_engines(plan: BuildPlan, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """Builds the engines of a plan into its bundle, all or none, and returns their engine.json.

    Ctrl-C (KeyboardInterrupt) stops the builder and leaves the bundle as it was.
    Raises: UserError for too little memory, a graph that TensorRT does not take, or a warning that means that the
    engine would not be what was exported.
    """
    check_memory(plan.needed_bytes, plan.free_bytes, plan.bundle.config["dtype"])
    cancelled = Event()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.bundle.path) as scratch:
        if plan.plugin.library:
            load_library(plan.flavour, plan.plugin.library)
        built = {
            spec.name: run_interruptible(
                lambda spec=spec: _build_graph(plan, spec, Path(scratch), progress, cancelled), cancelled
            )
            for spec in plan.graphs
        }
        values = _engine_json(plan, built)
        files: dict[str, bytes | Path] = {
            f"{plan.folder}/{graph.path.name}": graph.path for graph in built.values()
        }
        files[f"{plan.folder}/{provenance.FILE}"] = (json.dumps(values, indent=1) + "\n").encode()
        if plan.plugin.library and not values["plugin"]["in_engine"]:
            files[f"{plan.folder}/{plan.plugin.library.name}"] = plan.plugin.library.read_bytes()
        cache = Path(scratch) / TIMING_CACHE
        if cache.exists() and plan.timing_cache is None:
            files[f"{plan.folder}/{TIMING_CACHE}"] = cache
        plan.bundle.add_files(files)
    return values


def _build_graph(
    plan: BuildPlan, spec: GraphSpec, scratch: Path, progress: Progress, cancelled: Event
) -> BuiltGraph:
    """Parses, lifts the weights out, builds, and writes the engine to the scratch folder."""
    assert plan.flavour is not None
    trt, started = plan.flavour.trt, time.monotonic()
    log, messages = logger(trt)
    messages.clear()
    with_plugin = plan.plugin.library is not None and spec.name == GRAPH
    source = plan.bundle.file(f"onnx/{spec.name}.onnx").resolve()
    builder, network, parser = parse_graph(
        trt, log, messages, source, plan.plugin.model if with_plugin else None
    )
    shared = _shared_weights(plan, spec)
    lifted = {
        name: shared[name]
        for name in lift_weights(trt, network, {name: w.shape for name, w in shared.items()})
    }
    check_interface(spec, network, lifted)
    _check_plugin_layers(trt, network, num_attention_nodes(plan.bundle) if with_plugin else 0)
    judge(spec.name, messages.warnings)
    config = _config(plan, builder, spec, with_plugin)
    restore = _use_timing_cache(plan, config, scratch)
    monitor = progress_monitor(trt, Phases(spec.name, progress, cancelled))
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failure(spec, messages.errors, cancelled)
    warnings = judge(spec.name, messages.warnings) + _own_copy(shared, lifted)
    restore()
    path = scratch / f"{spec.name}.engine"
    path.write_bytes(memoryview(engine))
    layers = Counter(messages.layers)
    if with_plugin and layers and layers["PluginV3"] != num_attention_nodes(plan.bundle):
        raise UserError(
            f"{spec.name}: {layers['PluginV3']} of {num_attention_nodes(plan.bundle)} attention nodes became "
            "plugin layers; use --plugin off"
        )
    onnx_name = f"onnx/{spec.name}.onnx"
    return BuiltGraph(
        {
            "engine": path.name,
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "onnx": onnx_name,
            "onnx_sha256": plan.bundle.files[onnx_name]["sha256"],
            "seconds": round(time.monotonic() - started, 1),
            "layers": dict(sorted(layers.items())),
            "activation_bytes": messages.activation_bytes,
            "aliases": {
                out: past for out, past in spec.aliases.items() if with_plugin and out.startswith("present.")
            },
            "weights": {name: [w.dtype, list(w.shape), w.offset, w.num_bytes] for name, w in lifted.items()},
        },
        path,
        warnings,
        messages.library_is_in_engine,
    )


def _shared_weights(plan: BuildPlan, spec: GraphSpec) -> dict[str, Any]:
    if not plan.target.shared_weights or spec.name not in WITH_SHARED_WEIGHTS:
        return {}
    return {name: weight for name, weight in stored_weights(plan.bundle).items() if is_shared(weight)}


def _own_copy(shared: dict[str, Any], lifted: dict[str, Any]) -> list[str]:
    """A warning where the parser gave layers' matrices other names, so that they stayed in the engine."""
    left = [name for name in shared if name.startswith("layers.") and name not in lifted]
    return (
        [f"{len(left)} weights stay in this engine: the device holds a second copy of them"] if left else []
    )


def _check_plugin_layers(trt: Any, network: Any, wanted: int) -> None:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    found = kinds.count(trt.LayerType.PLUGIN_V3)
    if found != wanted:
        raise UserError(f"{found} of {wanted} attention nodes became plugin layers; use --plugin off")


def _config(plan: BuildPlan, builder: Any, spec: GraphSpec, with_plugin: bool) -> Any:
    """The builder config: profile, workspace, GPUs, aliased plugin caches; float32 means float32 (no TF32)."""
    trt = plan.flavour.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_mib << 20)
    config.add_optimization_profile(optimization_profile(builder, spec, plan.profile))
    config.clear_flag(trt.BuilderFlag.TF32)
    if with_plugin:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        config.plugins_to_serialize = [str(plan.plugin.library)]
    if plan.flavour.builds_anywhere:
        config.num_compute_capabilities = len(plan.capabilities)
        for index, capability in enumerate(plan.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    return config


def _use_timing_cache(plan: BuildPlan, config: Any, scratch: Path) -> Callable[[], None]:
    """Gives the builder what earlier builds measured; the function returned keeps what this one adds.

    TensorRT-RTX measures nothing while it builds and has no such cache.
    """
    if plan.flavour.builds_anywhere:
        return lambda: None
    in_bundle = f"{plan.folder}/{TIMING_CACHE}"
    kept = plan.timing_cache or scratch / TIMING_CACHE
    sources = [kept] + (
        [plan.bundle.file(in_bundle)] if in_bundle in plan.bundle.files and plan.timing_cache is None else []
    )
    before = next((path.read_bytes() for path in sources if path.exists()), b"")
    cache = config.create_timing_cache(before)
    config.set_timing_cache(cache, False)

    def keep() -> None:
        try:
            kept.write_bytes(memoryview(config.get_timing_cache().serialize()))
        except OSError as error:
            raise UserError(
                f"cannot write the timing cache {kept} ({error.strerror}); choose another --timing-cache"
            ) from error

    return keep


def _failure(spec: GraphSpec, errors: list[str], cancelled: Event) -> BaseException:
    if cancelled.is_set():
        return KeyboardInterrupt()
    reason = one_line(errors[0]) if errors else "it gave no reason"
    return UserError(
        f"TensorRT could not build {spec.name} ({reason}); try --plugin off, a smaller --batch or a larger --workspace"
    )


def _engine_json(plan: BuildPlan, built: dict[str, BuiltGraph]) -> dict[str, Any]:
    """What provenance.py's docstring lists."""
    flavour, library = plan.flavour, plan.plugin.library
    in_engine = library is not None and built[GRAPH].library_is_in_engine
    return {
        "schema": provenance.SCHEMA,
        "tool_version": TOOL_VERSION,
        "target": plan.target.name,
        "flavour": flavour.name,
        "version": flavour.version,
        "compute_capabilities": list(plan.capabilities),
        "os": provenance.this_os(),
        "arch": provenance.this_arch(),
        "bundle_hash": plan.bundle.hash,
        "profile": {"images": list(plan.profile.images), "prompt_tokens": list(plan.profile.prompt_tokens)},
        "workspace_mib": plan.workspace_mib,
        "flags": {
            "strongly_typed": True,
            "tf32": False,
            "aliased_plugin_io": library is not None,
            "host_code": in_engine,
        },
        "plugin": None
        if library is None
        else {
            "library": library.name,
            "sha256": file_sha256(library),
            "in_engine": in_engine,
            "num_nodes": num_attention_nodes(plan.bundle),
        },
        "weights_file": weights_file(plan.bundle),
        "graphs": {name: graph.description for name, graph in built.items()},
        "warnings": [f"{name}: {text}" for name, graph in built.items() for text in graph.warnings],
    }
