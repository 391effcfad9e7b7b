"""Result of a check of `verify`: passed or not, in numbers, and where the first difference is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Divergence:
    """The first difference. head: the KV head's number in the checkpoint; row: of the batch; None
    where it has no place.
    """

    what: str
    step: int | None = None
    layer: int | None = None
    group: int | None = None
    head: int | None = None
    row: int | None = None
    error: float | None = None
    allowed: float | None = None

    def __str__(self) -> str:
        places = [
            f"{name} {value}"
            for name in ("step", "layer", "group", "head", "row")
            if (value := getattr(self, name)) is not None
        ]
        size = "" if self.error is None else f" by {self.error:.3g} (allowed {self.allowed:g})"
        return f"{self.what}{size}" + (f" at {', '.join(places)}" if places else "")


@dataclass(frozen=True)
class Rung:
    """One check. figures: what was measured; divergence: None if and only if it passed."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    divergence: Divergence | None = None

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return self.divergence is None

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data for a report."""
        found = (
            None
            if self.divergence is None
            else {**asdict(self.divergence), "text": str(self.divergence)}
        )
        return {
            "name": self.name,
            "ok": self.ok,
            "figures": self.figures,
            "first_divergence": found,
        }
