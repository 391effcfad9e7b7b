"""Sampling numbers: what is accepted, and what is refused with its name before anything is
drawn.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_export.errors import UserError
from ssd_export.sampling import (
    MAX_CFG_SCALE,
    MAX_TEMPERATURE,
    Sampling,
    as_count,
    as_float,
    as_seed,
)


@pytest.mark.parametrize(
    "name, value",
    [
        ("cfg_scale", 1e39),
        ("cfg_scale", -5),
        ("cfg_scale", math.nan),
        ("cfg_scale", math.inf),
        ("cfg_scale", 10**400),
        ("cfg_scale", "5"),
        ("cfg_scale", b"5"),
        ("cfg_scale", [5.0]),
        ("temperature", -1e-9),
        ("temperature", 1e39),
        ("temperature", math.nan),
        ("temperature", 1j),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", 2**31),
        ("top_k", True),
        ("top_k", "5"),
    ],
)
def test_a_number_that_cannot_be_sampled_with_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name} .*; use"):
        Sampling(**{name: value})


@given(
    st.floats(0, MAX_CFG_SCALE, width=32),
    st.floats(0, MAX_TEMPERATURE),
    st.integers(0, 2**31 - 1),
)
def test_what_is_accepted_is_finite_in_float32(cfg: float, temperature: float, top_k: int) -> None:
    sampling = Sampling(np.float32(cfg), np.float64(temperature), np.int64(top_k))
    assert type(sampling.cfg_scale) is type(sampling.temperature) is float
    assert type(sampling.top_k) is int and sampling.top_k == top_k
    assert np.isfinite(np.array([sampling.cfg_scale, sampling.temperature], np.float32)).all()


def test_numbers_of_other_kinds_are_kept_as_pythons() -> None:
    assert Sampling(Fraction(5, 2), np.array(0.5), np.uint8(3)) == Sampling(2.5, 0.5, 3)


def test_none_leaves_a_number_as_it_was() -> None:
    own = Sampling(3.0, 0.7, 9)
    assert own.changed() == own
    assert own.changed(cfg_scale=0, temperature=0, top_k=0) == Sampling(0.0, 0.0, 0)


@pytest.mark.parametrize("value", [0, 2**64 - 1, np.uint64(2**64 - 1), np.int8(5)])
def test_seeds(value: object) -> None:
    assert as_seed(value) == int(value) and type(as_seed(value)) is int


@pytest.mark.parametrize("value", [-1, 2**64, 10**400, 1.0, "1", None, True, np.float32(1)])
def test_what_is_no_seed(value: object) -> None:
    with pytest.raises(UserError, match=r"^seed .*0 \.\. 2\*\*64 - 1; use a number such as 0$"):
        as_seed(value)


def test_counts_say_what_to_use() -> None:
    assert as_count(np.int32(4), "num_images") == 4
    with pytest.raises(UserError, match="^num_images 0 is below 1; use 1 or more$"):
        as_count(0, "num_images")
    with pytest.raises(UserError, match="^batch 9 is above 8; use at most 8$"):
        as_count(9, "batch", way_out="use at most 8", most=8)
    with pytest.raises(UserError, match="is not a number; use 1$"):
        as_float("x" * 99, "x", "use 1")
