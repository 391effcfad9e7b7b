"""Shares and means with their 95 % uncertainty: no number of a table stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """hits of total, with the Wilson score interval (Wilson 1927), which is sound near 0 and 1 and
    for small totals.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share, 0..1; NaN of none."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end at 95 %."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        middle = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        scale = 1 + Z95**2 / n
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def to_dict(self) -> dict[str, Any]:
        """Hits, total, share and the ends of its interval."""
        low, high = self.interval
        return {
            "hits": self.hits,
            "total": self.total,
            "share": self.value,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True)
class Mean:
    """The mean of num_values independent values and its standard error (nan for a single value)."""

    value: float
    standard_error: float
    num_values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean and standard error of independent values; NaN of none."""
        n = len(values)
        if not n:
            return cls(math.nan, math.nan, 0)
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, n)

    @classmethod
    def of_differences(cls, values: Sequence[float], baseline: Sequence[float]) -> Mean:
        """Mean of values minus baseline, case by case: what the cases have in common does not widen
        the interval.
        """
        return cls.of([value - base for value, base in zip(values, baseline, strict=True)])

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval."""
        return Z95 * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """Plain data; null where a number is not known, since JSON has no NaN."""
        value, error = (
            None if math.isnan(number) else number for number in (self.value, self.standard_error)
        )
        return {"mean": value, "standard_error": error, "num_values": self.num_values}
