"""Names of cache tensors are made and read in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_export.graph_spec import CACHE_KINDS, CacheTensor, GraphSpec, TensorSpec

NUMBERS = st.integers(0, 10_000)


@given(layer=NUMBERS, group=NUMBERS, kind=st.sampled_from(CACHE_KINDS))
def test_a_name_reads_back(layer: int, group: int, kind: str) -> None:
    cache = CacheTensor(layer, group, kind)
    assert CacheTensor.parse(cache.past) == CacheTensor.parse(cache.present) == cache
    assert cache.past == f"past_key_values.{layer}.{group}.{kind}"


@pytest.mark.parametrize(
    "name",
    ["tokens", "present_tokens", "past_key_values.0.key", "present.0.0.keys", "present.a.0.key"]
    + ["xpresent.0.0.key", "present.0.0.key.scale", "past.0.0.key", ""],
)
def test_other_tensors_are_none(name: str) -> None:
    assert CacheTensor.parse(name) is None


def test_a_graph_knows_its_cache_tensors() -> None:
    key, score = CacheTensor(0, 1, "key"), CacheTensor(2, 0, "score")
    past, present = (TensorSpec(name, "float32", ()) for name in (key.past, score.present))
    tokens = TensorSpec("tokens", "int32", ())
    spec = GraphSpec("g", (tokens, past), (present, tokens))
    assert spec.cache_inputs == {key: past} and spec.cache_outputs == {score: present}


def test_no_other_module_builds_or_cuts_these_names() -> None:
    package = Path(__file__).parents[1] / "ssd_export"
    found = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if path.name != "graph_spec.py"
        and any(text in path.read_text() for text in ('"past_key_values', '"present.', '"present"'))
    ]
    assert not found
