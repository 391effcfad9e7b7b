"""Which outputs of an engine share memory with their inputs, and which are copied there after a run.

ONNX Runtime runs one node after the other and may write every output that a graph's contract aliases
over its input. A builder fuses: it makes one kernel of "the least position of all slots" and "the
positions after the release", which then overwrites what its other blocks still read. So an engine of
plain operators shares only keys and values, which no kernel reduces and overwrites at once; positions
and scores, a few bytes a slot, are copied. The plugin's kernel writes all of a cache in place: a
block owns a head of a row. Every build is checked against its layer listing (layer_listing.hazards).
"""

from __future__ import annotations

from collections.abc import Mapping

from ssd_export.graph_spec import CacheTensor, GraphSpec

STEP, NEXT_STEP = "step", "next_step"
WRITTEN_BY_ROWS = ("key", "value")


def in_place(spec: GraphSpec, has_plugin: bool) -> dict[str, str]:
    """Output -> the input whose memory it is."""
    caches = (CacheTensor.parse(output) for output in spec.aliases)
    return {
        cache.present: cache.past
        for cache in caches
        if cache is not None and (has_plugin or cache.kind in WRITTEN_BY_ROWS)
    }


def carried(spec: GraphSpec, shared: Mapping[str, str]) -> dict[str, str]:
    """Output -> the input of the next run that it is copied to, where they share no memory;
    positions first.
    """
    caches = sorted(spec.cache_outputs, key=lambda cache: cache.kind != "position")
    following = {cache.present: cache.past for cache in caches} | spec.aliases | {NEXT_STEP: STEP}
    inputs = {tensor.name for tensor in spec.inputs}
    outputs = {tensor.name for tensor in spec.outputs}
    return {
        output: past
        for output, past in following.items()
        if output in outputs and past in inputs and output not in shared
    }
