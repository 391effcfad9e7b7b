"""Head maps: built-in ones, to a file and back, the controls, and every message a user can get."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.model.families import assumed_head_map
from ssd_export.policy.head_map import HeadMap, find_head_map
from ssd_export.policy.make import make_policy
from ssd_export.policy.table import HeadOption, Rule
from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated, places
from tests.policy.test_make import GQA, GQA_MAP, JANUS_1B, JANUS_7B, own_map

OPTIONS = (HeadOption(Rule(-1, 0, False), 32, 1), HeadOption(Rule(-1, 40, True, 5), 112, 24))
COSTS = tuple(tuple((0.5, 1e-7) for _ in range(2)) for _ in range(3))
RICH = replace(
    GQA_MAP,
    cost_options=OPTIONS,
    costs=COSTS,
    model_fingerprint="ab" * 32,
    neighborhood="2d:1",
    prompts_hash="cd" * 32,
    tool_version="0.1",
    provenance="calibrated",
    statistics={"prompt_share": [[0.1] * 6] * 3},
)


def test_built_in_maps_have_the_published_shares() -> None:
    small, large = own_map(JANUS_1B), own_map(JANUS_7B)
    assert (round(small.semantic_share, 3), round(large.semantic_share, 3)) == (0.479, 0.618)
    assert small.threshold == 0.2 and small.provenance == "read off the figure of arXiv 2510.18716"
    assert small.metric[0][:3] == (0.833, 0.995, 0.031) and small.metric[7][9:11] == (0.054, 0.723)
    assert [sum(layer) for layer in large.semantic()][:4] == [31, 29, 14, 8]


def test_a_map_survives_its_file(tmp_path: Path) -> None:
    RICH.save(tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json") == RICH
    assert RICH.for_model(GQA, "ab" * 32) is RICH and RICH.for_model(GQA) is RICH


def test_finding_a_map(tmp_path: Path) -> None:
    assert find_head_map(GQA) is None and find_head_map(GQA, model_dir=tmp_path) is None
    RICH.save(tmp_path / "head_map.json")
    assert find_head_map(GQA, model_dir=tmp_path) == RICH
    assert find_head_map(GQA, tmp_path / "head_map.json") == RICH
    assert find_head_map(JANUS_1B, "janus-pro-1b", assumed="janus-pro-1b") == own_map(JANUS_1B)
    assert find_head_map(GQA, "swapped", model_dir=tmp_path) == RICH.swapped()
    assert find_head_map(GQA, "random:3", model_dir=tmp_path) == RICH.random(3)


def test_a_built_in_map_is_assumed_for_its_family_and_shape_alone() -> None:
    assert own_map(JANUS_1B).note.startswith("head map assumed: read off the paper's figure for")
    assert own_map(JANUS_1B).random(0).note and not RICH.note
    assert assumed_head_map(JANUS_1B, {"my-fine-tune"}) == "janus-pro-1b"
    assert assumed_head_map(JANUS_1B, {"janus-1.3b"}) is None
    assert assumed_head_map(JANUS_1B, {"snapshot", "janus-1.3b-onnx"}) is None
    assert assumed_head_map(replace(JANUS_1B, hidden_size=1024), ()) is None
    assert find_head_map(JANUS_1B) is None, "none is assumed unless it is named"
    other = replace(JANUS_1B, grid=Grid(16, 16))
    assert assumed_head_map(other, ()) is None
    with pytest.raises(UserError, match="for another model: grid 24 x 24, the model has 16 x 16"):
        find_head_map(other, "janus-pro-1b")


def test_without_a_map_there_are_two_ways_out() -> None:
    with pytest.raises(UserError, match="no head map; run `ssd-export calibrate`.*--policy h2o"):
        make_policy("ssd-row", JANUS_1B, budget=0.2, head_map=find_head_map(JANUS_1B))


def test_swapped_turns_every_head() -> None:
    for head_map in (GQA_MAP, own_map(JANUS_1B)):
        for before, after in zip(head_map.semantic(), head_map.swapped().validate().semantic()):
            assert all(a != b for a, b in zip(before, after))


def test_random_keeps_the_share_and_depends_on_the_seed_alone() -> None:
    for head_map in (RICH, own_map(JANUS_1B)):
        drawn = head_map.random(1).validate()
        assert drawn == head_map.random(1) and drawn.costs == ()
        assert sorted(sum(drawn.kv_metric(), ())) == pytest.approx(
            sorted(sum(head_map.kv_metric(), ()))
        )
    assert own_map(JANUS_1B).random(1).metric != own_map(JANUS_1B).random(2).metric


def test_threshold_by_share() -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        head_map = own_map(JANUS_1B).with_semantic_share(share)
        assert head_map.semantic_share == pytest.approx(share, abs=0.01)
    with pytest.raises(UserError, match="use 0.5"):
        GQA_MAP.with_semantic_share(1.5)


def _option(image_slots: int, evict_every: int = 1) -> dict:
    return {
        "num_sinks": -1,
        "num_recent": 0,
        "by_score": False,
        "image_slots": image_slots,
        "evict_every": evict_every,
    }


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"version": 1}, "version 1, this tool reads 2"),
        ({"grid": None}, "grid is null, expected an object"),
        ({"metric": [[0.1] * 6] * 2}, r"metric has 2 rows of \[6\] heads, 3 rows of 6 wanted"),
        ({"metric": [[0.1] * 5] * 3}, r"rows of \[5\] heads"),
        ({"metric": [[0.1] * 6, [0.1] * 5, [0.1] * 6]}, r"rows of \[5, 6\] heads"),
        ({"metric": [[0.1] * 6] * 4}, "metric has 4 rows"),
        ({"metric": [[float("nan")] + [0.1] * 5] * 3}, "not JSON"),
        ({"metric": [[1.5] * 6] * 3}, "shares from 0 to 1"),
        ({"metric": [["high"] * 6] * 3}, r'metric\[0\]\[0\] is "high", expected a number'),
        ({"metric": None}, "metric is null, expected a list"),
        ({"threshold": None}, "threshold is null, expected a number"),
        ({"threshold": float("nan")}, "not JSON"),
        ({"num_layers": "three"}, 'num_layers is "three", expected a whole number'),
        ({"num_kv_heads": 4}, "6 heads cannot share 4 KV heads"),
        ({"costs": []}, "costs of 0 layers, 3 wanted"),
        ({"costs": [[[0.1]] * 2] * 3}, "costs of layer 0"),
        ({"costs": [[[0.1, float("inf")]] * 2] * 3}, "not JSON"),
        ({"costs": [[[0.1, -0.1]] * 2] * 3}, "a cost is below 0"),
        ({"cost_options": [{"image_slots": 3}]}, r"cost_options\[0\].num_sinks is missing"),
        ({"cost_options": [_option(0), _option(16)]}, "option of 0 image slots breaks"),
        (
            {"cost_options": [_option(40), _option(50, evict_every=51)]},
            "option of 50 image slots breaks",
        ),
    ],
)
def test_damaged_maps_are_refused(tmp_path: Path, damage: dict, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**RICH.to_dict(), **damage}))
    with pytest.raises(UserError, match=message) as error:
        HeadMap.load(path)
    assert (
        str(path) in str(error.value)
        and "calibrate" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read head map"):
        HeadMap.load(tmp_path / "absent.json")
    for content in (b"{", b"\xff\xfe", b"[1, 2]", b"null", b""):
        (tmp_path / "odd.json").write_bytes(content)
        with pytest.raises(UserError, match="odd.json"):
            HeadMap.load(tmp_path / "odd.json")
    with pytest.raises(UserError, match="cannot write head map"):
        RICH.save(tmp_path / "absent" / "map.json")


def test_maps_of_other_models_are_refused(tmp_path: Path) -> None:
    RICH.save(tmp_path / "map.json")
    with pytest.raises(UserError, match="another model: num_layers 3, the model has 24"):
        find_head_map(JANUS_1B, tmp_path / "map.json")
    with pytest.raises(
        UserError, match="same shape .fingerprint abababababab, the model has cdcdcdcdcdcd"
    ):
        find_head_map(GQA, tmp_path / "map.json", fingerprint="cd" * 32)
    with pytest.raises(UserError, match="needs this model's own map"):
        find_head_map(GQA, "swapped")
    with pytest.raises(UserError, match="use random:0"):
        find_head_map(JANUS_1B, "random:x", assumed="janus-pro-1b")


@settings(max_examples=300)
@given(
    place=st.sampled_from(places(json.loads(json.dumps(RICH.to_dict())))),
    wrong=st.sampled_from((REMOVED, *WRONG_VALUES)),
)
def test_one_wrong_value_anywhere(
    tmp_path_factory: pytest.TempPathFactory, place: tuple, wrong: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(mutated(json.dumps(RICH.to_dict()), place, wrong))
    try:
        HeadMap.load(path).semantic()
    except UserError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
        assert "ssd-export calibrate" in str(error) and len(str(error)) < 2000


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "head_map.json")
    with pytest.raises(UserError, match="is a named pipe"):
        HeadMap.load(tmp_path / "head_map.json")
