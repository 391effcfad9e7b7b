"""The forms in which a decode step attends over its caches, and what each means for their memory.

plugin      the plugin's kernels: read a cache once and write all of it in place; a block owns a
            head of a row, or a part of its slots
kv-update   the KV-cache-update layer of TensorRT-RTX and TensorRT 10.15 or newer
(export/kv_update.py):
            keys and values are [rows x heads, 1, slots, head_dim] and written in place
as bundled  the graph as it is in the bundle, ONNX Runtime's form: TensorRT copies caches

ONNX Runtime runs one node after the other and may write every output that a graph's contract
aliases over its input. A builder fuses: it makes one kernel of "the least position of all slots"
and "the positions after the eviction", which then overwrites what its other blocks still read. So
an engine of plain operators shares only keys and values, which no kernel reduces and overwrites at
once; positions and scores, a few bytes a slot, are copied to their inputs after a run. Every build
is checked against its layer listing (layer_listing.hazards). TensorRT lists no such thing: there
the bundle's form shares nothing, and every cache is copied to its input after a run.

A prefill is separate from the form of the step: where there is a KV-cache-update layer, it takes
the caches and writes the prompt's keys and values into them (export/prefill_caches.py). Elsewhere,
and for caches in int8, it returns them and they are copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Literal

from ssd_export.graph_spec import CacheTensor, Dimension, GraphSpec, TensorSpec

Form = Literal["plugin", "kv-update", "as bundled"]
PLUGIN: Form = "plugin"
KV_UPDATE: Form = "kv-update"
AS_BUNDLED: Form = "as bundled"
STEP, NEXT_STEP = "step", "next_step"
WRITTEN_BY_ROWS = ("key", "value")
PREFILL, DECODE_STEP, DECODE_WINDOW = "prefill", "decode_step", "decode_window"
CELLS = re.compile(r"rows_x(\d+)")  # rows times heads of a head group, as one dimension


def engine_contract(contracts: Mapping[str, GraphSpec], graph: str, is_in_place: bool) -> GraphSpec:
    """The contract of a graph's engine: the graph's, but for a prefill that writes its keys and
    values into the caches, which are then inputs and outputs of it.
    """
    spec = contracts[graph]
    if not (is_in_place and graph.startswith(PREFILL)):
        return spec
    caches = {
        cache: tensor
        for cache, tensor in contracts[DECODE_STEP].cache_inputs.items()
        if cache.kind in WRITTEN_BY_ROWS
    }
    presents = {cache.present: replace(caches[cache], name=cache.present) for cache in caches}
    return replace(
        spec,
        inputs=(*spec.inputs, *caches.values()),
        outputs=tuple(presents.get(tensor.name, tensor) for tensor in spec.outputs),
        aliases={cache.present: cache.past for cache in caches},
    )


def engine_spec(spec: GraphSpec, form: Form) -> GraphSpec:
    """The contract of a graph's engine with the shapes that the engine has."""
    is_step = form == KV_UPDATE and spec.name.startswith(DECODE_STEP)
    if not (is_step or fills_caches(spec)):
        return spec
    inputs, outputs = (tuple(map(_in_cells, side)) for side in (spec.inputs, spec.outputs))
    return replace(spec, inputs=inputs, outputs=outputs)


def fills_caches(spec: GraphSpec) -> bool:
    """Whether a graph is a prefill that writes its keys and values into the caches."""
    return spec.name.startswith(PREFILL) and bool(spec.aliases)


def _in_cells(tensor: TensorSpec) -> TensorSpec:
    cache = CacheTensor.parse(tensor.name)
    if cache is None or cache.kind not in WRITTEN_BY_ROWS:
        return tensor
    _, heads, slots, dim = tensor.shape
    return replace(tensor, shape=(f"rows_x{heads}", 1, slots, dim))


def size_of(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """The number that a dimension of an engine's tensor stands for. Raises: KeyError for a name
    that no contract has.
    """
    if isinstance(dimension, int):
        return dimension
    cells = CELLS.fullmatch(dimension)
    return sizes["rows"] * int(cells[1]) if cells else sizes[dimension]


def num_elements(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Numbers of a tensor at those sizes."""
    return prod(size_of(dimension, sizes) for dimension in tensor.shape)


def in_place(spec: GraphSpec, form: Form, lists_layers: bool = True) -> dict[str, str]:
    """Output -> the input whose memory it is.

    Args: lists_layers: whether the builder says which layers read and write a tensor, in what
    order. Plugin and kv-update declare to TensorRT what they overwrite; the bundle's form declares
    nothing, so that only a listing shows that its caches may be shared. Without the plugin a pass
    of lookahead has always that form.
    """
    is_window = spec.name.startswith(DECODE_WINDOW)
    is_as_bundled = form == AS_BUNDLED or (is_window and form != PLUGIN)
    if is_as_bundled and not lists_layers:
        return {}
    caches = (CacheTensor.parse(output) for output in spec.aliases)
    return {
        cache.present: cache.past
        for cache in caches
        if cache is not None and (form == PLUGIN or cache.kind in WRITTEN_BY_ROWS)
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
