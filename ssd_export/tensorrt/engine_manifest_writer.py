"""Makes the EngineManifest of a build."""

from __future__ import annotations

from collections.abc import Mapping

from ssd_export.bundle.hashes import sha256
from ssd_export.tensorrt.build_graph import GraphEngine
from ssd_export.tensorrt.build_memory import weights_file
from ssd_export.tensorrt.engine_manifest import (
    SCHEMA,
    EngineManifest,
    Flags,
    PluginEntry,
    this_arch,
    this_os,
)
from ssd_export.tensorrt.plan import BuildPlan
from ssd_export.tensorrt.plugin import num_attention_nodes
from ssd_export.version import TOOL_VERSION


def engine_manifest(plan: BuildPlan, built: Mapping[str, GraphEngine]) -> EngineManifest:
    """The engine.json of the engines of a plan."""
    flavor = plan.flavor
    assert flavor is not None
    plugin = _plugin(plan, built)
    return EngineManifest(
        schema=SCHEMA,
        tool_version=TOOL_VERSION,
        target=plan.target.name,
        flavor=flavor.name,
        version=flavor.version,
        compute_capabilities=plan.capabilities,
        os=this_os(),
        arch=this_arch(),
        bundle_hash=plan.bundle.hash,
        batch=(plan.batch.min, plan.batch.opt, plan.batch.max),
        prompt_slots=plan.prompt_slots,
        workspace_mib=plan.workspace_mib,
        flags=Flags(
            strongly_typed=True,
            tf32=False,
            aliased_plugin_io=plugin is not None,
            host_code=plugin is not None and plugin.in_engine,
        ),
        form=plan.step.form,
        plugin=plugin,
        weights_file=weights_file(plan.bundle),
        graphs={name: graph.entry for name, graph in built.items()},
        warnings=tuple(
            f"{name}: {text}" for name, graph in built.items() for text in graph.warnings
        ),
    )


def _plugin(plan: BuildPlan, built: Mapping[str, GraphEngine]) -> PluginEntry | None:
    library = plan.step.library
    if not plan.step.has_plugin:
        return None
    return PluginEntry(
        library=library.name if library else None,
        sha256=sha256(library) if library else None,
        in_engine=all(
            made.library_is_in_engine for name, made in built.items() if plan.step.uses_plugin(name)
        ),
        num_nodes=num_attention_nodes(plan.bundle),
    )
