"""The builder config of one graph: profiles, workspace, GPUs, aliased plugin caches, and the timing
cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.network import optimization_profile
from ssd_export.tensorrt.plan import BuildPlan
from ssd_export.tensorrt.step_form import engine_spec

TIMING_CACHE = "timing.cache"
log = logging.getLogger(__name__)
# TensorRT-RTX captures only what allocates nothing by itself; a graph that cannot do so fails here,
# where it is built, instead of on the device. TensorRT has no such flag.
CAPTURABLE = "REQUIRE_USER_ALLOCATION"


def builder_config(plan: BuildPlan, builder: Any, spec: GraphSpec) -> Any:
    """Float32 means float32 (no TF32); layers keep their names, which the builder's listing
    shows.
    """
    trt = plan.builder_flavor.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_mib << 20)
    rows = plan.bundle.config.model.rows_per_image
    for profile in plan.profiles(spec.name):
        shaped = engine_spec(spec, plan.step.form)
        config.add_optimization_profile(optimization_profile(builder, shaped, profile, rows))
    config.clear_flag(trt.BuilderFlag.TF32)
    capturable = trt.BuilderFlag.__members__.get(CAPTURABLE)
    if capturable is not None:
        config.set_flag(capturable)
    if plan.step.uses_plugin(spec.name):
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if plan.step.library:
            config.plugins_to_serialize = [str(plan.step.library)]
    if plan.builder_flavor.builds_anywhere:
        config.num_compute_capabilities = len(plan.capabilities)
        for index, capability in enumerate(plan.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    return config


def use_timing_cache(plan: BuildPlan, config: Any, scratch: Path) -> Callable[[], None]:
    """Gives the builder what earlier builds measured; the function returned keeps what this one
    adds.

    TensorRT-RTX measures nothing while it builds and has no such cache.
    """
    if plan.builder_flavor.builds_anywhere:
        return lambda: None
    in_bundle = f"{plan.folder}/{TIMING_CACHE}"
    kept = plan.timing_cache or scratch / TIMING_CACHE
    sources = [kept]
    if in_bundle in plan.bundle.files and plan.timing_cache is None:
        sources.append(plan.bundle.file(in_bundle))
    before = next((path.read_bytes() for path in sources if path.exists()), b"")
    cache = _timing_cache(config, before)

    def keep() -> None:
        try:
            kept.write_bytes(memoryview(cache.serialize()))
        except OSError as error:
            raise UserError(
                f"cannot write the timing cache {kept} ({error.strerror}); choose another"
                " --timing-cache"
            ) from error

    return keep


def _timing_cache(config: Any, before: bytes) -> Any:
    """The builder's timing cache with what earlier builds measured; empty where TensorRT does not
    take that: of another GPU or version, or damaged.
    """
    cache = config.create_timing_cache(before)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    log.warning("the timing cache is of another GPU or version of TensorRT: measured anew")
    empty = config.create_timing_cache(b"")
    config.set_timing_cache(empty, False)
    return empty
