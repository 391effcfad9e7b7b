"""build-engine's work: the engines of a plan, added to the bundle at once or not at all.

One copy of the weights on the device: their matrices are inputs of prefill and decode_step, so that
both engines are given the same buffers (each copied once to an address that is a multiple of 256,
which TensorRT asks of inputs). Measured with TensorRT-RTX 1.7.1 in fp16: the layers are the same,
145 of the demo model's decode step and 1261 of one in the shape of Janus-Pro-1B, where the engine
is 42 MB instead of 2.6 GB and the builder's peak 0.8 instead of 8.3 GB
(docs/measurements/build.json). The other way, both graphs in one network with common initializers,
keeps 4.6 MB where one copy is 3.0 MB, and would run both at every call. Quantized matrices stay in
both engines (memory.shared_weights says why). Whether a product with a constant matrix is faster on
a GPU was not measured: none was at hand; `shared_weights = false` in a recipe puts them back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event

from ssd_export.files import disk_errors
from ssd_export.locks import scratch_folder
from ssd_export.tensorrt.allocator import return_large_buffers
from ssd_export.tensorrt.build_graph import GraphEngine, build_graph
from ssd_export.tensorrt.build_memory import check_memory
from ssd_export.tensorrt.build_progress import Progress
from ssd_export.tensorrt.builder_config import TIMING_CACHE
from ssd_export.tensorrt.engine_manifest import FILE, EngineEntry, EngineManifest
from ssd_export.tensorrt.engine_manifest_writer import engine_manifest
from ssd_export.tensorrt.interruptible import run_interruptible
from ssd_export.tensorrt.plan import BuildPlan, plugin_graphs
from ssd_export.tensorrt.plugin import load_library, make_plugin_graph, prepared_name
from ssd_export.typed_json import to_json

Finished = Callable[[str, EngineEntry, float], None]


def build_engines(
    plan: BuildPlan,
    progress: Progress = lambda stage, done, total: None,
    finished: Finished = lambda name, entry, share: None,
    stopping: Callable[[], None] = lambda: None,
) -> EngineManifest:
    """Builds the engines of a plan into its bundle, all or none, and returns their engine.json.

    Args: finished: told each engine as it is built, and the share of the work that is done by then;
        TensorRT-RTX compiles in one long step that reports nothing. stopping: called when an
        interrupt has arrived.
    Ctrl-C (KeyboardInterrupt) stops the builder after the step it is in and leaves the bundle as it
    was.
    Raises: UserError for too little memory, a graph that TensorRT does not take, or a warning that
    means that the engine would not be what was exported.
    """
    if not plan.force_memory:
        config = plan.bundle.config
        check_memory(plan.needed_bytes, plan.free_bytes, config.dtype, config.precision.weights)
    return_large_buffers()
    cancelled, built = Event(), {}
    with (
        disk_errors(plan.bundle.path, "make it writable, or copy the bundle to another disk"),
        scratch_folder(plan.bundle.folder, ".building-") as scratch,
    ):
        if plan.step.library:
            load_library(plan.builder_flavor, plan.step.library)
        sizes = {
            spec.name: plan.bundle.files[f"onnx/{spec.name}.onnx"].bytes for spec in plan.graphs
        }
        for spec in plan.graphs:
            built[spec.name] = run_interruptible(
                partial(build_graph, plan, spec, scratch, progress, cancelled),
                cancelled,
                stopping,
            )
            share = sum(sizes[name] for name in built) / sum(sizes.values())
            finished(spec.name, built[spec.name].entry, share)
        manifest = engine_manifest(plan, built)
        plan.bundle.add_files(
            _files(plan, built, manifest, scratch), instead_of=_earlier_files(plan)
        )
    return manifest


def _files(
    plan: BuildPlan, built: dict[str, GraphEngine], manifest: EngineManifest, scratch: Path
) -> dict[str, bytes | Path]:
    """Files for the bundle, by name."""
    files: dict[str, bytes | Path] = {
        f"{plan.folder}/{graph.path.name}": graph.path for graph in built.values()
    }
    files[f"{plan.folder}/{FILE}"] = to_json(manifest).encode()
    if plan.step.library and manifest.plugin and not manifest.plugin.in_engine:
        files[f"{plan.folder}/{plan.step.library.name}"] = plan.step.library.read_bytes()
    cache = scratch / TIMING_CACHE
    if cache.exists() and plan.timing_cache is None:
        files[f"{plan.folder}/{TIMING_CACHE}"] = cache
    return files


def _earlier_files(plan: BuildPlan) -> list[str]:
    """Files of an earlier build in the same folder: other graphs perhaps, or the other flavor."""
    cache = f"{plan.folder}/{TIMING_CACHE}"
    return [
        name for name in plan.bundle.files if name.startswith(f"{plan.folder}/") and name != cache
    ]


def prepare(plan: BuildPlan) -> list[str]:
    """Adds to the bundle what a board lacks to build with the plugin: the decode step, and the pass
    of lookahead where one is planned, with the kernels inside.

    Returns the files' names. Raises: UserError where there are no kernels for the target.
    """
    names = plugin_graphs(plan.top_k, bool(plan.window))
    files = {
        prepared_name(name, capability): make_plugin_graph(plan.bundle, name, (capability,))
        for name in names
        for capability in plan.capabilities
    }
    plan.bundle.add_files(files)
    return list(files)
