"""rope_theta as transformers reads it, or refused: never another number without a word."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from ssd_export.errors import UserError
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.rope import rope_theta

THETAS = st.sampled_from([None, 10000.0, 500000, 1e6])
KINDS = st.sampled_from([None, "default", "linear"])


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    """A text_config that says something about RoPE in any of its places."""
    text: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if draw(st.booleans()):
            said = {
                "rope_theta": draw(THETAS),
                "rope_type": draw(KINDS),
                "type": draw(KINDS),
                "factor": draw(st.sampled_from([None, None, None, 2.0])),
            }
            text[name] = {key: value for key, value in said.items() if value is not None}
    theta = draw(THETAS)
    return text if theta is None else {**text, "rope_theta": theta}


def own(text: dict[str, Any]) -> float | None:
    try:
        return rope_theta(ConfigFile(Path("config.json"), text, "text_config."))
    except UserError:
        return None


@settings(max_examples=300)
@given(sections())
def test_read_as_transformers_or_refused(text: dict[str, Any]) -> None:
    read = own(copy.deepcopy(text))
    if read is None:
        return
    theirs = LlamaConfig(**copy.deepcopy(text)).rope_parameters
    assert theirs["rope_type"] == "default" and theirs["rope_theta"] == read


@pytest.mark.parametrize("place", ["rope_theta", "rope_scaling", "rope_parameters"])
def test_one_place_alone_is_read(place: str) -> None:
    inner = {"rope_type": "default", "rope_theta": 5e5}
    assert own({place: 5e5 if place == "rope_theta" else inner}) == 5e5
    assert own({}) == 10000.0 and own({place: None}) == 10000.0


@pytest.mark.parametrize(
    "text, words",
    [
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}}, ["1e+06", "500000", "keep"]),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_theta": 5e5}}, ["rope_scaling.rope_theta"]),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "default"}},
            ["10000", "500000"],
        ),
        ({"rope_scaling": {"factor": 8.0}}, ["factor", "no scaling"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3"]),
        ({"rope_scaling": "linear"}, ["'linear'", "an object"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": "1e6"}, ["'1e6'", "a positive number"]),
        ({"rope_theta": math.nan}, ["nan", "a positive number"]),
        ({"rope_theta": True}, ["True"]),
    ],
)
def test_contradictions_are_refused_with_both_values(
    text: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        rope_theta(ConfigFile(Path("config.json"), text, "text_config."))
    for word in ["config.json", *words]:
        assert word in str(refused.value)
