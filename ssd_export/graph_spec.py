"""The form of a graph's contract: exporter, runners, engine builder and C++ read the same names
from the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NUM_SORTED_CODES = "num_sorted_codes"  # the input with a default that graphs with top-k have
Dimension = int | str
CACHE_KINDS = ("key", "value", "key_scale", "value_scale", "position", "score")
_CACHE_NAME = re.compile(rf"(?:past_key_values|present)\.(\d+)\.(\d+)\.({'|'.join(CACHE_KINDS)})")


@dataclass(frozen=True, order=True)
class CacheTensor:
    """A tensor of a head group's cache: graphs take it as `past` and give it back as `present`.

    kind: one of CACHE_KINDS.
    """

    layer: int
    group: int
    kind: str

    @property
    def past(self) -> str:
        """Name as an input of a graph."""
        return f"past_key_values.{self.layer}.{self.group}.{self.kind}"

    @property
    def present(self) -> str:
        """Name as an output of a graph."""
        return f"present.{self.layer}.{self.group}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> CacheTensor | None:
        """The cache tensor that a graph's input or output is; None for any other tensor."""
        found = _CACHE_NAME.fullmatch(name)
        return cls(int(found[1]), int(found[2]), found[3]) if found else None


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. shape: numbers, or the names that bundle/graphs.py lists."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def sizes(self, dimensions: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers. Raises: KeyError for a dimension without one."""
        return tuple(size if isinstance(size, int) else dimensions[size] for size in self.shape)

    def resolved(self, dimensions: Mapping[str, int]) -> TensorSpec:
        """The same with a shape in numbers. Raises: KeyError for a dimension without one."""
        return TensorSpec(self.name, self.dtype, self.sizes(dimensions))


@dataclass(frozen=True)
class GraphSpec:
    """The contract of a graph. aliases: output name -> input name that may share its memory."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def cache_inputs(self) -> dict[CacheTensor, TensorSpec]:
        """The inputs that are cache tensors."""
        return _caches(self.inputs)

    @property
    def cache_outputs(self) -> dict[CacheTensor, TensorSpec]:
        """The outputs that are cache tensors."""
        return _caches(self.outputs)


def _caches(tensors: tuple[TensorSpec, ...]) -> dict[CacheTensor, TensorSpec]:
    parsed = {tensor: CacheTensor.parse(tensor.name) for tensor in tensors}
    return {cache: tensor for tensor, cache in parsed.items() if cache is not None}
