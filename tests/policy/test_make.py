"""make_policy: what each policy's table says, that budgets are met, and every message a user can
get.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.config import Grid, ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.families import PUBLISHED, assumed_head_map, janus
from ssd_export.policy.head_map import HeadMap, find_head_map
from ssd_export.policy.make import make_policy, policy_from_head_options
from ssd_export.policy.presets import POLICIES, Heads, Policy, default_policy, margin_columns
from ssd_export.policy.table import HeadGroup, HeadOption, PolicyTable, Rule, check_group
from ssd_export.typed_json import parse_json

JANUS_1B, JANUS_7B = (PUBLISHED[f"janus-pro-{size}"] for size in ("1b", "7b"))
GQA = replace(JANUS_1B, hidden_size=64, num_layers=3, num_heads=6, num_kv_heads=2)
GQA_METRIC = ((0.0, 0.1, 0.4, 0.9, 0.9, 0.9), (0.1,) * 6, (0.3, 0.3, 0.3, 0.0, 0.0, 0.1))
GQA_MAP = HeadMap(janus.NAME, janus.GRID, 3, 6, 2, 64, GQA_METRIC, 0.2)
ONE_SIZE = tuple(name for name, row in POLICIES.items() if row.heads is Heads.ALIKE)
BY_TYPE = tuple(name for name, row in POLICIES.items() if row.heads is Heads.BY_TYPE)
BUDGETED = (*ONE_SIZE, *BY_TYPE)


def own_map(config: ModelConfig) -> HeadMap | None:
    """The built-in map that may be assumed for a model."""
    return find_head_map(config, assumed=assumed_head_map(config, ()))


def policy(
    name: str, budget: float = 0.2, config: ModelConfig = JANUS_1B, **options
) -> PolicyTable:
    return make_policy(name, config, budget=budget, **{"head_map": own_map(config), **options})


def kinds(table: PolicyTable) -> set[tuple[Rule, int, int]]:
    return {
        (group.rule, group.num_slots - table.prompt_slots, group.evict_every)
        for layer in table.layers
        for group in layer
    }


def test_the_tables_at_a_fifth() -> None:
    assert kinds(policy("full")) == {(Rule(-1, 0, False), 576, 1)}
    assert kinds(policy("streaming-llm")) == {(Rule(-1, 0, False), 115, 1)}
    assert kinds(policy("streaming-llm", num_sinks=4)) == {(Rule(4, 0, False), 115, 1)}
    assert kinds(policy("h2o")) == {(Rule(-1, 57, True), 115, 1)}
    assert kinds(policy("h2o", num_sinks=0, evict_every=24)) == {(Rule(0, 57, True), 115, 24)}
    assert kinds(policy("tova")) == {(Rule(-1, 0, True), 115, 1)}
    assert kinds(policy("linear")) == {(Rule(-1, 48, True), 115, 24)}
    window = (Rule(-1, 0, False), 64, 1)
    assert kinds(policy("ssd")) == {window, (Rule(-1, 85, True), 170, 1)}
    assert kinds(policy("ssd", num_recent=0)) == {window, (Rule(-1, 0, True), 170, 1)}
    assert kinds(policy("ssd-row")) == {window, (Rule(-1, 85, True), 170, 24)}
    assert kinds(policy("margin")) == {
        window,
        (Rule(-1, 0, False, margin_columns(janus.GRID)), 170, 24),
    }
    assert {name for name in POLICIES if policy(name, 1.0).score_decay == 1.0} == set(POLICIES)
    assert [policy(name).score_decay for name in ("tova", "linear", "h2o", "ssd-row")] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]


def test_heads_follow_the_map() -> None:
    table, semantic = policy("ssd-row"), own_map(JANUS_1B).semantic()
    for groups, order, types in zip(table.layers, table.head_order, semantic):
        by_place = [group.rule.by_score for group in groups for _ in range(group.num_heads)]
        assert by_place == sorted(types) and [types[head] for head in order] == by_place
    assert [sum(layer) for layer in semantic][:5] == [13, 3, 4, 7, 8]


def test_a_kv_head_is_semantic_by_the_mean_of_its_query_heads() -> None:
    assert GQA_MAP.semantic() == ((False, True), (False, False), (True, False))
    table = policy("ssd-row", config=GQA, head_map=GQA_MAP)
    assert table.head_order == ((0, 1), (0, 1), (1, 0))
    assert [len(groups) for groups in table.layers] == [2, 1, 2]


def test_one_slots_count_less_than_the_budget_is_all_that_is_lost() -> None:
    for config in (JANUS_1B, JANUS_7B):
        for name in BUDGETED:
            for budget in (0.1, 0.13, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999):
                table = policy(name, budget, config)
                assert budget * 576 - 1 < table.image_slots_mean <= budget * 576 + 1e-9, (
                    name,
                    budget,
                )
                assert table.budget_in_force == table.image_slots_mean / 576


@settings(max_examples=200)
@given(
    name=st.sampled_from((*ONE_SIZE, "ssd", "ssd-row")),
    mills=st.integers(45, 1000),
    num_semantic=st.integers(0, 6),
    prompt_slots=st.integers(1, 64),
)
def test_any_budget_gives_a_valid_table_with_the_slots_it_pays_for(
    name: str, mills: int, num_semantic: int, prompt_slots: int
) -> None:
    metric = tuple(
        tuple(float(start + head // 3 < num_semantic) for head in range(6)) for start in (0, 2, 4)
    )
    head_map = replace(GQA_MAP, metric=metric)
    table = policy(name, mills / 1000, GQA, head_map=head_map, prompt_slots=prompt_slots)
    groups = [group for layer in table.layers for group in layer]
    slots = sum(group.num_heads * (group.num_slots - prompt_slots) for group in groups)
    wanted = Fraction(mills, 1000) * 576 * 6
    assert wanted - 6 < slots <= wanted
    assert read_back(table.to_dict()) == table


@pytest.mark.parametrize("name", POLICIES)
def test_budget_one_is_the_full_cache(name: str) -> None:
    full = policy("full")
    assert replace(policy(name, 1.0), name="full") == full
    assert kinds(full) == {(Rule(-1, 0, False), 576, 1)} and full.budget_in_force == 1.0


def test_full_ignores_the_budget_it_is_given() -> None:
    assert policy("full", 0.2) == policy("full", 1.0)


def test_small_budgets_shrink_defaults_and_say_so() -> None:
    table = policy("ssd-row", 0.05)
    assert kinds(table) == {(Rule(-1, 0, False), 25, 1), (Rule(-1, 16, True), 32, 12)}
    assert any("window 25 instead of 64" in note for note in table.notes)
    assert any("evict_every 12 instead of 24" in note for note in table.notes)
    assert "num_recent 25 instead of 48" in policy("linear", 0.1).notes[0]
    assumed = (
        "head map assumed: read off the paper's figure for Janus-Pro; run `ssd-export calibrate`"
    )
    assert [note[: len(assumed)] for note in policy("ssd-row", 0.2).notes] == [assumed]
    assert policy("ssd-row", 0.2, GQA, head_map=GQA_MAP).notes == ()


def test_a_window_that_was_asked_for_is_kept() -> None:
    table = policy("ssd-row", 0.2, window=100)
    assert {slots for _, slots, _ in kinds(table)} == {100, 131}
    assert {slots for _, slots, _ in kinds(policy("ssd-row", 0.9, window=100))} == {100, 576}


@pytest.mark.parametrize("mean", [40, 57, 90])
def test_a_default_window_is_seven_tenths_of_a_small_budget(mean: int) -> None:
    table = policy("ssd-row", (mean + 0.01) / 576, GQA, head_map=GQA_MAP)
    windows = {slots for rule, slots, _ in kinds(table) if not rule.by_score}
    assert windows == {max(25, min(64, 7 * mean // 10))}


def test_the_least_budget_pays_for_the_guard_and_the_buffer() -> None:
    """num_recent protects the newest token too, for which the buffer has a slot."""
    heads, semantic = 6, 2
    assert sum(map(sum, GQA_MAP.semantic())) == semantic
    asked = dict(window=40, num_recent=8, evict_every=6)
    least = 7 + 6
    slots = (heads - semantic) * 40 + semantic * least
    table = policy("ssd-row", (slots + 0.01) / (576 * heads), GQA, head_map=GQA_MAP, **asked)
    assert (Rule(-1, 8, True), least, 6) in kinds(table)
    with pytest.raises(UserError, match=f"at least {least} image slots"):
        policy("ssd-row", (slots - 0.5) / (576 * heads), GQA, head_map=GQA_MAP, **asked)


def test_cache_bytes() -> None:
    table = policy("streaming-llm")
    assert table.cache_bytes(JANUS_1B, 2, 2) == 2 * 24 * 16 * (64 + 115) * (2 * 128 * 2 + 4)
    assert policy("h2o").cache_bytes(JANUS_1B, 2, 2) == 2 * 24 * 16 * (64 + 115) * (2 * 128 * 2 + 8)
    assert table.full_cache_bytes(JANUS_1B, 2, 2) == 2 * 196608 * 640
    for name in BUDGETED:
        table = policy(name)
        share = table.image_cache_bytes(JANUS_1B, 2, 2) / table.full_image_cache_bytes(
            JANUS_1B, 2, 2
        )
        assert 0.19 < share < 0.21


def test_ssd_auto_takes_an_allocation() -> None:
    options = [HeadOption(Rule(-1, 0, False), 32, 1), HeadOption(Rule(-1, 40, True), 80, 24)]
    table = make_policy(
        "ssd-auto", GQA, budget=0.1, allocation=[options, options[::-1], [options[0]] * 2]
    )
    assert table.image_slots_mean == pytest.approx((4 * 32 + 2 * 80) / 6)
    assert POLICIES["ssd-auto"].needs_head_map
    with pytest.raises(ValueError, match="at most 1 groups"):
        make_policy("ssd-auto", GQA, budget=0.1, groups=1, allocation=[options] * 3)
    with pytest.raises(ValueError, match="3 layers x 2 KV heads"):
        policy_from_head_options(GQA, "ssd-auto", 0.1, 64, [options])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sdd", {}, "unknown policy 'sdd'; choose one of full, ssd-auto"),
        ("h2o", {"budget": 0}, r"outside \(0, 1\]"),
        ("h2o", {"budget": -0.1}, r"outside \(0, 1\]"),
        ("full", {"budget": 1.01}, r"outside \(0, 1\]"),
        ("h2o", {"budget": math.nan}, r"outside \(0, 1\]"),
        ("h2o", {"budget": 0.001}, "use budget >= 0.0018"),
        (
            "h2o",
            {"window": 64},
            "h2o takes no window; drop --window, or use --policy ssd-row or ssd",
        ),
        ("ssd-row", {"window": 24}, "does not hold the token one grid row above; use window >= 25"),
        (
            "ssd-row",
            {"budget": 0.05, "window": 64},
            "window=64 .* use budget >= 0.0588 or a smaller window",
        ),
        ("ssd-row", {"budget": 0.01}, "too small for window=25 .* use budget >= 0.0235"),
        ("margin", {"budget": 0.05}, "at least 73 image slots .* use budget >= 0.0834"),
        ("ssd-row", {"head_map": None}, "run `ssd-export calibrate`"),
        ("margin", {"head_map": None}, "no head map"),
        ("ssd-auto", {}, "run `ssd-export calibrate`, or use --policy ssd-row"),
        ("h2o", {"evict_every": 0}, "use evict_every >= 1"),
        ("h2o", {"num_recent": -1}, "use num_recent >= 0"),
        ("h2o", {"num_sinks": -2}, "use num_sinks >= -1"),
        ("h2o", {"num_recent": 116, "evict_every": 24}, r"use image slots >= 139 \(now 115"),
        ("streaming-llm", {"evict_every": 116}, "use image slots >= 116"),
        ("streaming-llm", {"prompt_slots": 0}, "holds no prompt"),
    ],
)
def test_user_errors_name_the_fix(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        policy(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.001, "name": "h2o"},
        {"budget": 0.01, "name": "ssd-row"},
        {"budget": 0.05, "name": "ssd-row", "window": 64},
        {"budget": 0.05, "name": "margin"},
    ],
)
def test_the_budget_a_message_names_works(options: dict) -> None:
    with pytest.raises(UserError) as error:
        policy(**options)
    policy(**{**options, "budget": float(str(error.value).split("use budget >= ")[1].split()[0])})


@pytest.mark.parametrize(
    "group, message",
    [
        (HeadGroup(Rule(-2, 0, True), 20, 1, 1), "num_sinks >= -1"),
        (HeadGroup(Rule(0, 0, True, 1 << 24), 20, 1, 1), "24 bits"),
        (HeadGroup(Rule(0, 0, True), 20, 1, 0), "leave empty groups out"),
        (HeadGroup(Rule(0, 0, True), 20, 0, 1), "at least 1"),
        (HeadGroup(Rule(0, 0, True), 5, 1, 1), "larger budget"),
    ],
)
def test_group_errors(group: HeadGroup, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_group(group, 5, janus.GRID)


def read_back(values: dict[str, object]) -> PolicyTable:
    return parse_json(json.dumps(values).encode(), PolicyTable, "table", "export again").validate()


def test_damaged_tables_are_refused() -> None:
    values = policy("ssd-row").to_dict()
    short, doubled = values["head_order"][:-1], [[0] * 16] * 24
    for damage, message in [
        ({"layers": None}, "layers is null, expected a list"),
        ({"prompt_slots": "64"}, 'prompt_slots is "64", expected a whole number'),
        ({"layers": []}, "0 layers"),
        ({"score_decay": 2}, "score_decay"),
        ({"head_order": doubled}, "permutation"),
        ({"head_order": short}, "23 head"),
    ]:
        with pytest.raises(UserError, match=message):
            read_back({**values, **damage})
    del values["prompt_slots"]
    with pytest.raises(UserError, match="prompt_slots is missing"):
        read_back(values)


def test_policies_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, ssd_export.policy.presets; sys.exit(any(m in sys.modules for m in ('torch',"
        " 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_has_a_line_for_every_policy() -> None:
    assert default_policy(has_costs=True, has_options=False) == "ssd-auto"
    assert default_policy(has_costs=True, has_options=True) == "ssd-row"
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", readme, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} >= set(POLICIES)


@pytest.mark.parametrize("side", [8, 16, 24, 32])
@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_sizes_follow_the_grid(name: str, budget: float, side: int) -> None:
    config = replace(GQA, grid=Grid(side, side))
    head_map = replace(GQA_MAP, grid=config.grid)
    table = policy(name, max(budget, 3.2 / side), config, head_map=head_map)
    slots = {slots for _, slots, _ in kinds(table)}
    assert max(slots) <= side * side and table.image_slots_mean <= table.budget * side * side
    assert all(side % every == 0 for _, _, every in kinds(table))
    if name == "margin":
        assert {rule.num_pinned_columns for rule, _, _ in kinds(table)} == {0, 3}
        assert max(rule.pinned_columns for rule, _, _ in kinds(table)) >> side - 2 == 0b11


def test_a_row_is_all_that_a_new_policy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Policy("newest-half", Heads.ALIKE, num_recent=lambda slots, grid: slots // 4)
    monkeypatch.setitem(POLICIES, row.name, row)
    assert kinds(policy("newest-half")) == {(Rule(-1, 28, True), 115, 1)}


def test_numbers_that_nothing_comes_of_are_refused_or_said() -> None:
    with pytest.raises(UserError, match="full takes no evict_every; drop --evict-every"):
        policy("full", evict_every=24)
    with pytest.raises(UserError, match="ssd-auto takes no num_recent"):
        policy("ssd-auto", num_recent=3)
    table = policy("h2o", 1.0, evict_every=24)
    assert table.notes == ("budget 1 keeps everything: evict_every has no effect",)
