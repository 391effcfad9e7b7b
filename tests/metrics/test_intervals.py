"""Intervals against numbers from the literature, closed forms and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ssd_export.metrics.intervals import Mean, Share


@pytest.mark.parametrize(
    "hits, total, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombe_1998_table_1(
    hits: int, total: int, low: float, high: float
) -> None:
    assert Share(hits, total).interval == pytest.approx((low, high), abs=5e-5)


def test_an_empty_share_knows_nothing() -> None:
    assert Share(0, 0).interval == (0.0, 1.0) and math.isnan(Share(0, 0).value)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    intervals = [Share(int(hits), 300).interval for hits in rng.binomial(300, 0.93, 2000)]
    assert 0.93 < np.mean([low <= 0.93 <= high for low, high in intervals]) < 0.97


def test_differences_of_equal_cases_are_exact() -> None:
    baseline = [0.1, 0.5, 0.9]
    assert Mean.of_differences([value + 0.25 for value in baseline], baseline).half_width < 1e-15
    assert Mean.of([1.0, 3.0]) == Mean(2.0, 1.0, 2)


def test_one_value_has_no_error_and_json_no_nan() -> None:
    assert (
        json.loads(json.dumps(Mean.of([1.0]).to_dict(), allow_nan=False))["standard_error"] is None
    )
