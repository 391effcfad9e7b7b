"""The form of a graph's contract: exporter, runners, engine builder and C++ read the same names
from the bundle.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GraphSpec:
        inputs, outputs = (
            tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in values[side])
            for side in ("inputs", "outputs")
        )
        return cls(values["name"], inputs, outputs, dict(values["aliases"]))
