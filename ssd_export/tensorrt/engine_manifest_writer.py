"""Writes engine.json, as the docstring of provenance.py lists it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssd_export.bundle.hashes import sha256
from ssd_export.tensorrt import engine_manifest as provenance
from ssd_export.tensorrt.build_graph import GraphEngine
from ssd_export.tensorrt.build_memory import weights_file
from ssd_export.tensorrt.plan import DECODE_STEPS, BuildPlan
from ssd_export.tensorrt.plugin import num_attention_nodes
from ssd_export.version import TOOL_VERSION


def engine_json(plan: BuildPlan, built: Mapping[str, GraphEngine]) -> dict[str, Any]:
    """What the engines of a plan were built from and for."""
    flavour = plan.flavour
    plugin = _plugin(plan, built)
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
        "batch": [plan.batch.min, plan.batch.opt, plan.batch.max],
        "prompt_slots": plan.prompt_slots,
        "workspace_mib": plan.workspace_mib,
        "flags": {
            "strongly_typed": True,
            "tf32": False,
            "aliased_plugin_io": plugin is not None,
            "host_code": plugin is not None and plugin["in_engine"],
        },
        "plugin": plugin,
        "weights_file": weights_file(plan.bundle),
        "graphs": {name: graph.description for name, graph in built.items()},
        "warnings": [f"{name}: {text}" for name, graph in built.items() for text in graph.warnings],
    }


def _plugin(plan: BuildPlan, built: Mapping[str, GraphEngine]) -> dict[str, Any] | None:
    library = plan.plugin.library
    if not plan.plugin.is_used:
        return None
    return {
        "library": library and library.name,
        "sha256": library and sha256(library),
        "in_engine": all(
            built[name].library_is_in_engine for name in DECODE_STEPS if name in built
        ),
        "num_nodes": num_attention_nodes(plan.bundle),
    }
