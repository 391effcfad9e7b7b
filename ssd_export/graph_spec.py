"""The form of a graph's contract: exporter, runners, engine builder and C++ read the same names
from the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """shape: numbers, or the names that export/graphs.py lists."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class GraphSpec:
    """aliases: output name -> input name that may share its memory."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: dict[str, str] = field(default_factory=dict)
