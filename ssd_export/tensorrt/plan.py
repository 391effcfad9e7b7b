"""The plan of build-engine, settled and checked before any work: bundle, target, flavor, plugin,
graphs, memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.machine import free_bytes
from ssd_export.tensorrt import engine_manifest as provenance
from ssd_export.tensorrt.build_memory import needed_bytes
from ssd_export.tensorrt.flavors import Flavor, is_installed, load_flavor, missing
from ssd_export.tensorrt.kv_update import kv_update_graph
from ssd_export.tensorrt.plugin import check_prepared, find_library, plugin_graph
from ssd_export.tensorrt.profiles import Profile, profiles_of
from ssd_export.tensorrt.step_form import (
    AS_BUNDLED,
    DECODE_WINDOW,
    KV_UPDATE,
    PLUGIN,
    Form,
    engine_contract,
)
from ssd_export.tensorrt.target import (
    AUTO,
    FIRST_WITH_FP8,
    Batch,
    Target,
    choose_flavor,
    choose_target,
    fp8_targets,
    gpu_here,
)
from ssd_export.tensorrt.window_plan import planned_window

GRAPHS = ("prefill", "decode_step", "evict", "image_decoder")
WINDOW_GRAPHS = (DECODE_WINDOW,)
TOP_K = "_top_k"  # the graphs that sample among the likeliest codes
DECODE_STEPS = ("decode_step", "decode_step_top_k")  # the graphs that attend over caches
PREFILLS = ("prefill", "prefill_top_k")


def plugin_graphs(top_k: bool, window: bool) -> tuple[str, ...]:
    """The graphs that attend by the plugin, in a build with top-k and lookahead."""
    names = DECODE_STEPS[:1] + WINDOW_GRAPHS * window
    return names + tuple(f"{name}{TOP_K}" for name in names if top_k)


@dataclass(frozen=True)
class BuildSpec:
    """Options of build-engine; None leaves a number to the target's recipe, and the window of
    lookahead (window_plan.py) to the bundle.
    """

    bundle: Path
    target: str = AUTO
    flavor: str = AUTO
    plugin: str = AUTO
    top_k: bool = False
    batch: Batch | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    force_memory: bool = False
    lookahead: int | None = None


@dataclass(frozen=True)
class StepPlan:
    """The form of the decode step (step_form.py), and whether the prefill writes into the caches.

    models: by graph, the decode steps in this form, with the plugin the passes of lookahead, and
    the prefills that write into the caches; without those that are taken as bundled. library: the
    plugin's; None also where this process has registered the plugin without one. why_not: what
    speaks against the plugin and, where the form is the bundle's, against kv-update; no_window:
    what speaks against the plugin's pass of lookahead; why_copies: why the prompt's keys and values
    are copied into the caches after the prefill, "" where they are not.
    """

    form: Form
    models: dict[str, bytes] = field(default_factory=dict)
    library: Path | None = None
    why_not: str = ""
    no_window: str = ""
    why_copies: str = ""

    @property
    def has_plugin(self) -> bool:
        """Whether attention is the plugin."""
        return self.form == PLUGIN

    def uses_plugin(self, graph: str) -> bool:
        """Whether a graph's attention is the plugin."""
        return self.has_plugin and graph in self.models and graph not in PREFILLS


@dataclass(frozen=True)
class BuildPlan:
    """A settled and checked build. flavor: None where this machine can only prepare
    (engine.prepare); window: tokens of a pass of lookahead, 0 without an engine for it, and then
    no_window says why.
    """

    bundle: Bundle
    target: Target
    flavor: Flavor | None
    capabilities: tuple[int, ...]
    step: StepPlan
    top_k: bool
    batch: Batch
    workspace_mib: int
    timing_cache: Path | None
    needed_bytes: int
    free_bytes: int | None
    force_memory: bool
    window: int = 0
    no_window: str = ""

    @property
    def builder_flavor(self) -> Flavor:
        """The flavor, of a plan that this machine can build."""
        assert self.flavor is not None
        return self.flavor

    @property
    def folder(self) -> str:
        """The folder of the engines in the bundle."""
        flavor = self.builder_flavor
        return provenance.folder_name(flavor.name, flavor.version, self.capabilities)

    @property
    def prompt_slots(self) -> int:
        """Prompt slots of the bundle's policy."""
        return self.bundle.config.policy.prompt_slots

    def profiles(self, graph: str) -> tuple[Profile, ...]:
        """The sizes that the engine of a graph is tuned for."""
        return profiles_of(
            graph, self.batch, self.prompt_slots, self.target.decoder_images, self.window
        )

    @property
    def graphs(self) -> list[GraphSpec]:
        """Contracts of the engines to build, evict only where the plugin's kernel does not evict by
        itself (R7).
        """
        contracts = self.bundle.config.graphs
        names = GRAPHS + WINDOW_GRAPHS * bool(self.window)
        if self.top_k:
            names += tuple(f"{name}{TOP_K}" for name in names if f"{name}{TOP_K}" in contracts)
        return [
            engine_contract(contracts, name, is_in_place=name in self.step.models)
            for name in names
            if name in contracts and not (name == "evict" and self.step.has_plugin)
        ]


def plan_build(spec: BuildSpec, library: Callable[[], Path | None] = find_library) -> BuildPlan:
    """Everything that can be known before the work.

    Args: library: finds the plugin's library; returns None where the caller has registered the
    plugin by itself.
    Raises: UserError for a bundle, target, flavor, plugin or batch that will not do.
    """
    bundle, gpu = open_bundle(spec.bundle), gpu_here()
    target = choose_target(spec.target, gpu)
    flavor, capabilities = _choose(spec.flavor, target, gpu)
    capabilities = _that_multiply_its_weights(bundle, target, capabilities)
    if flavor is None and spec.plugin == "off":
        raise UserError(
            f"TensorRT builds for {target.title} on that machine itself: copy the bundle there and"
            f" run ssd-export build-engine --bundle DIR --target {target.name} --plugin off"
        )
    step = StepPlan(AS_BUNDLED)
    batch = spec.batch or target.batch
    window, no_window = planned_window(spec.lookahead, bundle, batch)
    if flavor is not None:
        step = _plan_step(spec, bundle, flavor, capabilities, bool(window), library)
        step = _with_prefill(step, spec, bundle, flavor)
    if step.no_window:
        window, no_window = 0, step.no_window
    return BuildPlan(
        bundle=bundle,
        target=target,
        flavor=flavor,
        capabilities=capabilities,
        step=step,
        top_k=spec.top_k,
        batch=batch,
        workspace_mib=spec.workspace_mib or target.workspace_mib,
        timing_cache=spec.timing_cache,
        needed_bytes=needed_bytes(bundle, target, flavor) if flavor else 0,
        free_bytes=free_bytes(),
        force_memory=spec.force_memory,
        window=window,
        no_window=no_window,
    )


def _choose(asked: str, target: Target, gpu: int | None) -> tuple[Flavor | None, tuple[int, ...]]:
    """The flavor to build with and the GPUs to build for; no flavor where only another machine
    can build.
    """
    on_this_gpu = gpu in target.compute_capabilities
    if asked == AUTO and not on_this_gpu:
        if "tensorrt-rtx" not in target.flavors:
            return None, target.compute_capabilities
        asked = "tensorrt-rtx"  # the one flavor that builds for a GPU that is not here
    name = choose_flavor(asked, target)
    if not is_installed(name):
        raise UserError(missing([name]))
    if name == "tensorrt" and not on_this_gpu:
        return None, target.compute_capabilities
    flavor = load_flavor(name)
    if not flavor.builds_anywhere:
        assert gpu is not None
        return flavor, (gpu,)
    capabilities = tuple(
        capability for capability in target.compute_capabilities if flavor.accepts(capability)
    )
    if not capabilities:
        raise UserError(
            f"{name} {flavor.version} does not build for {target.title}; use --flavor tensorrt on"
            " that machine"
        )
    return flavor, capabilities


def _that_multiply_its_weights(
    bundle: Bundle, target: Target, capabilities: tuple[int, ...]
) -> tuple[int, ...]:
    """The GPUs among these that know the format of the bundle's weights; one that does not fails
    the whole build.
    """
    precision = bundle.config.precision
    if "fp8" not in (precision.weights, precision.head):
        return capabilities
    able = tuple(capability for capability in capabilities if capability >= FIRST_WITH_FP8)
    if not able:
        raise UserError(
            f"{target.title} has no fp8, in which the bundle's weights are; export with --weights"
            f" int8 or int4, or use --target {' or '.join(fp8_targets())}"
        )
    return able


def _plan_step(
    spec: BuildSpec,
    bundle: Bundle,
    flavor: Flavor,
    capabilities: tuple[int, ...],
    with_window: bool,
    library: Callable[[], Path | None],
) -> StepPlan:
    """The plugin where it is asked for, or for `auto` where library and kernel are at hand; else
    the best form of plain operators.
    """
    names = plugin_graphs(spec.top_k, window=False)
    why_not = "--plugin off"
    if spec.plugin != "off":
        for name in plugin_graphs(spec.top_k, with_window):
            check_prepared(bundle, name, capabilities)
        try:
            found = library()
            models = {name: plugin_graph(bundle, name, capabilities) for name in names}
            no_window = ""
            if with_window:
                windows, no_window = _plugin_windows(spec, bundle, capabilities)
                models |= windows
            return StepPlan(PLUGIN, models, found, no_window=no_window)
        except UserError as error:
            if spec.plugin == "on":
                raise
            why_not = str(error)
    try:
        models = {name: kv_update_graph(bundle, name, flavor) for name in names}
    except UserError as error:
        return StepPlan(AS_BUNDLED, why_not=f"{why_not}; {error}")
    return StepPlan(KV_UPDATE, models, why_not=why_not)


def _plugin_windows(
    spec: BuildSpec, bundle: Bundle, capabilities: tuple[int, ...]
) -> tuple[dict[str, bytes], str]:
    """(the plugin's passes of lookahead by graph, why there are none).

    Raises: UserError where a window is asked for and there are no kernels for it, as on a board for
    which an earlier version prepared the decode step alone.
    """
    graphs = set(plugin_graphs(spec.top_k, window=True)) - {*DECODE_STEPS}
    try:
        return {name: plugin_graph(bundle, name, capabilities) for name in sorted(graphs)}, ""
    except UserError as error:
        if spec.lookahead is not None:
            raise
        return {}, str(error)


def _with_prefill(step: StepPlan, spec: BuildSpec, bundle: Bundle, flavor: Flavor) -> StepPlan:
    """The same with prefills that write into the caches, where there is a layer for it."""
    try:
        models = {
            name: kv_update_graph(bundle, name, flavor) for name in PREFILLS[: 1 + spec.top_k]
        }
    except UserError as error:
        return replace(step, why_copies=str(error))
    return replace(step, models={**step.models, **models})
