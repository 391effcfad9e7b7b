"""The evict graphs of single kinds of groups together do what the one graph of all does."""

from __future__ import annotations

from collections import Counter

from ssd_export.bundle.graphs import evict_specs
from ssd_export.config import ModelConfig, VQConfig
from ssd_export.model.families import janus
from ssd_export.policy.make import make_policy, policy_from_head_options
from ssd_export.policy.schedule import EvictionKind, eviction_kinds, eviction_steps, full_before
from ssd_export.policy.table import HeadOption, PolicyTable, Rule

CONFIG = ModelConfig(
    100,
    32,
    2,
    4,
    4,
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
OPTIONS = [
    HeadOption(Rule(-1, 4, True), slots, every)
    for slots, every in ((30, 6), (48, 12), (64, 1), (30, 6))
]


def mixed() -> PolicyTable:
    return policy_from_head_options(
        CONFIG, "ssd-auto", 0.1, 32, [OPTIONS, OPTIONS[1:] + OPTIONS[:1]]
    )


def test_every_tensor_of_evict_is_in_the_graph_of_one_kind() -> None:
    whole, *parts = evict_specs(CONFIG, mixed(), "float32")
    assert whole.name == "evict" and len(parts) == len(eviction_kinds(mixed())) == 2
    for side in ("inputs", "outputs"):
        counted = Counter(tensor.name for part in parts for tensor in getattr(part, side))
        assert set(counted) == {tensor.name for tensor in getattr(whole, side)}
        assert {name for name, count in counted.items() if count > 1} <= {"step", "prompt_length"}
    assert whole.aliases == {name: past for part in parts for name, past in part.aliases.items()}


def test_one_kind_needs_no_second_graph_and_no_eviction_none() -> None:
    every_6 = make_policy("h2o", CONFIG, budget=0.2, evict_every=6)
    assert [spec.name for spec in evict_specs(CONFIG, every_6, "float32")] == ["evict"]
    assert evict_specs(CONFIG, make_policy("full", CONFIG, budget=1.0), "float32") == []


def test_heads_are_full_after_the_slots_and_then_after_every_eviction() -> None:
    table = mixed()
    steps = full_before(table, EvictionKind(62, 6), [32, 30])
    assert {31, 37, 33, 39} <= steps and not {30, 32, 34} & steps
    assert eviction_steps(table, [32, 30]) == steps | full_before(
        table, EvictionKind(80, 12), [32, 30]
    )
