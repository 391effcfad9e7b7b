"""Permuted heads: each group is a slice, and a model computed with permuted heads is the same
model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssd_export.cache.attention import decode_attention, fill_from_prompt, prefill_attention
from ssd_export.cache.state import GroupState
from ssd_export.config import ModelConfig, VQConfig
from ssd_export.model.families import janus
from ssd_export.policy.layout import (
    group_slices,
    head_rows,
    inverse_order,
    query_head_order,
    query_slices,
)
from ssd_export.policy.make import policy_from_head_options
from ssd_export.policy.table import HeadGroup, HeadOption, PolicyTable, Rule
from ssd_export.typed_json import parse_json, to_json
from tests.cases import Case, Expected, expected, inputs

PROMPT_SLOTS = 5


def config_of(num_layers: int, num_kv_heads: int, query_group_size: int = 1) -> ModelConfig:
    num_heads = num_kv_heads * query_group_size
    return ModelConfig(
        100,
        32,
        num_layers,
        num_heads,
        num_kv_heads,
        8,
        64,
        1e4,
        1e-6,
        1024,
        16,
        8,
        VQConfig(8, 8, (1, 1), 1),
        janus.NAME,
        janus.GRID,
        janus.ROWS_PER_IMAGE,
    )


def test_groups_are_slices_of_the_permuted_heads() -> None:
    small, large = HeadOption(Rule(-1, 0, False), 8, 1), HeadOption(Rule(-1, 2, True), 30, 6)
    table = policy_from_head_options(
        config_of(2, 4), "ssd-auto", 0.1, PROMPT_SLOTS, [[large, small, large, small], [small] * 4]
    )
    assert table.layers[0] == (HeadGroup(small.rule, 13, 1, 2), HeadGroup(large.rule, 35, 6, 2))
    assert table.head_order == ((1, 3, 0, 2), (0, 1, 2, 3))
    assert group_slices(table.layers[0]) == (slice(0, 2), slice(2, 4))
    assert query_slices(table.layers[0], 3) == (slice(0, 6), slice(6, 12))
    assert query_head_order((1, 0), 2) == (2, 3, 0, 1)
    assert head_rows((1, 0), 3) == (3, 4, 5, 0, 1, 2)
    assert inverse_order((1, 3, 0, 2)) == (2, 0, 3, 1)
    assert parse_json(to_json(table).encode(), PolicyTable, "table", "") == table


def test_the_state_takes_the_bytes_that_the_table_says() -> None:
    config = config_of(2, 3, 2)
    options = [HeadOption(Rule(-1, 0, False), 8, 1), HeadOption(Rule(-1, 2, True), 30, 6)]
    per_head = [[*options, options[0]], [*options, options[1]]]
    table = policy_from_head_options(config, "ssd-auto", 0.1, PROMPT_SLOTS, per_head)
    groups = [group for layer in table.layers for group in layer]
    states = [GroupState.empty(4, group, config.head_dim, torch.float16) for group in groups]
    assert sum(state.num_bytes for state in states) == table.cache_bytes(
        config, dtype_bytes=2, rows=4
    )


@st.composite
def random_layers(draw: st.DrawFn) -> tuple[list[HeadOption], int, float, int]:
    kinds = []
    for _ in range(draw(st.integers(1, 3))):
        rule = Rule(draw(st.sampled_from((-1, 0, 4))), draw(st.integers(0, 6)), draw(st.booleans()))
        evict_every = draw(st.sampled_from((1, 6, 24)))
        least = max(1, rule.num_protected(PROMPT_SLOTS, janus.GRID) + evict_every - PROMPT_SLOTS)
        kinds.append(HeadOption(rule, least + draw(st.integers(0, 6)), evict_every))
    options = [draw(st.sampled_from(kinds)) for _ in range(draw(st.integers(1, 5)))]
    decay = draw(st.sampled_from((0.0, 0.9, 1.0)))
    return options, draw(st.integers(1, 2)), decay, draw(st.integers(0, 10**6))


@settings(max_examples=40)
@given(random_layers())
def test_random_tables_equal_the_oracle_head_by_head(
    layer: tuple[list[HeadOption], int, float, int],
) -> None:
    options, size, decay, seed = layer
    config = config_of(1, len(options), size)
    table = policy_from_head_options(
        config, "ssd-auto", 0.1, PROMPT_SLOTS, [options], score_decay=decay
    )
    case = Case(
        "layer",
        Rule(-1, 0, False),
        PROMPT_SLOTS + janus.GRID.num_tokens,
        num_heads=len(options),
        query_group_size=size,
        score_decay=decay,
        steps=45,
        seed=seed,
    )
    out, positions = run_layer(table, case)
    for head, option in enumerate(options):
        alone = expected_of_head(case, option)
        assume(alone.smallest_gap > 1e-5)
        np.testing.assert_array_equal(positions[head], alone.position[:, :, head])
        queries = slice(head * size, (head + 1) * size)
        np.testing.assert_allclose(
            out[:, :, queries], alone.out[:, :, queries], rtol=1e-5, atol=1e-5
        )


def expected_of_head(case: Case, option: HeadOption) -> Expected:
    """The oracle with every head under this option: inputs depend on the seed and the shapes
    alone.
    """
    return expected(
        replace(
            case,
            rule=option.rule,
            num_slots=PROMPT_SLOTS + option.image_slots,
            evict_every=option.evict_every,
        )
    )


def run_layer(table: PolicyTable, case: Case) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Out [steps, B, H*G, D] and each original head's positions [1 + steps, B, S]; permuted
    inside.
    """
    data = {name: torch.from_numpy(array) for name, array in vars(inputs(case)).items()}
    order, groups = list(table.head_order[0]), table.layers[0]
    queries = list(query_head_order(order, case.query_group_size))
    length = data["prompt_length"]
    parts = list(zip(groups, group_slices(groups), query_slices(groups, case.query_group_size)))
    prompt = [
        data["prompt_query"][:, queries],
        data["prompt_key"][:, order],
        data["prompt_value"][:, order],
    ]
    _, scores = prefill_attention(*prompt, length)
    states = []
    for group, heads, _ in parts:
        states.append(GroupState.empty(case.rows, group, case.head_dim))
        fill_from_prompt(
            states[-1], prompt[1][:, heads], prompt[2][:, heads], scores[:, heads], length
        )
    outs, moments = [], [[state.position.numpy().copy() for state in states]]
    for step in range(case.steps):
        query = data["query"][step][:, queries]
        key, value = data["key"][step][:, order], data["value"][step][:, order]
        permuted = [
            decode_attention(
                query[:, wide],
                key[:, heads],
                value[:, heads],
                state,
                table.of_group(group),
                length,
                length + step,
            )
            for state, (group, heads, wide) in zip(states, parts)
        ]
        outs.append(torch.cat(permuted, dim=1)[:, list(inverse_order(queries))].numpy())
        moments.append([state.position.numpy().copy() for state in states])
    by_place = [
        np.stack([moment[index][:, head] for moment in moments])
        for index, group in enumerate(groups)
        for head in range(group.num_heads)
    ]
    return np.stack(outs), {head: by_place[place] for place, head in enumerate(order)}
