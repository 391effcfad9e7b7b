"""Counts how often an engine goes over its caches and how many bytes a run moves, by the builder's
listing.

A decode step is bound by memory: it should read every key and value once and write one row of each.
A compiler that reorders or copies a cache first, to suit a product that it knows, multiplies that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import prod
from typing import TypeGuard

from ssd_export.graph_spec import CacheTensor
from ssd_export.tensorrt.layer_listing import Layer, Operand

OF_ROWS = ("key", "value")
MAX_READS = {"key": 2, "value": 1}  # scores may cost a second reading of the keys


def cache_copies(layers: Iterable[Layer]) -> list[str]:
    """Layers that copy, transpose or pad a key or value cache."""
    return copies(layers, lambda operand: _is_rows(CacheTensor.parse(operand.name)))


def copies(layers: Iterable[Layer], counts: Callable[[Operand], bool]) -> list[str]:
    """Layers that read a tensor that counts and write another one as large."""
    return [
        f"{layer.name} copies {source.name}"
        for layer in layers
        for source in layer.inputs
        if counts(source)
        and not layer.writes(source.name)
        and any(_size(operand) >= _size(source) for operand in layer.outputs)
    ]


def cache_reads(layers: Iterable[Layer]) -> dict[CacheTensor, list[str]]:
    """Names of the layers that go over each key and value cache, without those that write rows in
    place.
    """
    reads: dict[CacheTensor, list[str]] = {}
    for layer in layers:
        names = {operand.name for operand in layer.inputs if not layer.writes(operand.name)}
        for cache in filter(_is_rows, map(CacheTensor.parse, names)):
            reads.setdefault(cache, []).append(layer.name)
    return reads


def read_too_often(layers: Iterable[Layer]) -> list[str]:
    """Caches that more layers read than a step needs, and these layers."""
    return [
        f"{cache.past} is read {len(readers)} times, by {', '.join(readers)}"
        for cache, readers in sorted(cache_reads(layers).items())
        if len(readers) > MAX_READS[cache.kind]
    ]


def wasted_traffic(layers: Sequence[Layer], weights: Collection[str]) -> list[str]:
    """What an engine that writes caches in place moves beyond its weights and caches once, by
    layer. weights: those that are inputs of the engine and read once.
    """
    of_weights = copies(layers, lambda operand: operand.name in weights)
    return cache_copies(layers) + read_too_often(layers) + of_weights


def moved_bytes(layers: Iterable[Layer]) -> int:
    """Bytes that a run reads and writes in device memory, of an engine with fixed shapes: inputs
    and outputs of every layer. A tensor that a layer both reads and writes is written by rows,
    which the row's own tensor counts. What a kernel keeps to itself, and what the cache of the GPU
    saves, is not in a listing.

    Raises: ValueError for a size that varies.
    """
    total = 0.0
    for layer in layers:
        both = {o.name for o in layer.inputs} & {o.name for o in layer.outputs}
        for operand in {*layer.inputs, *layer.outputs}:
            if min(operand.shape, default=1) < 0:
                raise ValueError(f"{layer.name}: {operand.name} has no fixed size")
            total += operand.num_bytes * (operand.name not in both)
    return round(total)


def _is_rows(cache: CacheTensor | None) -> TypeGuard[CacheTensor]:
    return cache is not None and cache.kind in OF_ROWS


def _size(operand: Operand) -> int:
    """Elements; of a size that varies, which a batch's first one may, those of one."""
    return prod(map(abs, operand.shape))
