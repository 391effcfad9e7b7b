"""The attention benchmark steps what generation steps: real evictions, the bytes of the policy
table, whole reports.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.attention import (
    Comparison,
    Options,
    compare,
    policy_table,
    report,
    stretched,
)
from benchmarks.attention_layers import LayersRun, group_run
from ssd_export.model.families import PUBLISHED
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.policy.head_map import HeadMap

CONFIG = PUBLISHED["janus-pro-1b"]
NEEDS_DEMO = pytest.mark.skipif(not DEMO_CHECKPOINT.is_dir(), reason="needs the demo checkpoint")


def test_a_step_writes_the_new_token_and_evicts_what_is_due() -> None:
    table = policy_table("ssd-row", CONFIG, 0.2)
    semantic = next(group for group in table.layers[12] if group.evict_every > 1)
    run = group_run(semantic, table, CONFIG, rows=2, threads=1, seed=0)
    slots = semantic.num_slots
    for step in range(2):
        run.run(slots + step)
        position = run.values["past_position"].numpy()
        assert ((position == slots + step).sum(axis=-1) == 1).all()
        assert ((position < 0).sum(axis=-1) == semantic.evict_every - 1 - step).all()
    assert np.isfinite(run.values["out"].numpy()).all()


def test_bytes_are_those_of_the_policy_table() -> None:
    full = policy_table("full", CONFIG, 1.0)
    run = LayersRun(full, [0], CONFIG, rows=2, threads=1)
    assert run.num_bytes * CONFIG.num_layers == full.cache_bytes(CONFIG, 4, rows=2)
    began, computed_before = time.perf_counter(), time.process_time()
    passed, computed = run.median_seconds(3)
    # Two of three runs took the median or longer.
    assert 0 < 2 * passed <= time.perf_counter() - began
    assert 0 < 2 * computed <= time.process_time() - computed_before


@NEEDS_DEMO
def test_costs_are_assigned_to_every_head_of_the_larger_shape() -> None:
    small = HeadMap.load(DEMO_CHECKPOINT / "head_map.json")
    large = stretched(small, CONFIG).validate()
    assert (
        large.costs[0][0] == large.costs[3][4] == small.costs[0][0]
        and large.costs[23][15] == small.costs[5][3]
    )
    table = policy_table("ssd-auto", CONFIG, 0.2)
    assert (
        table.image_slots_mean == pytest.approx(0.2 * 576, abs=2)
        and table.image_slots_mean <= 0.2 * 576
    )


def test_a_report_has_a_line_for_each_policy() -> None:
    options = Options("janus-pro-1b", images=1, budget=0.2, steps=2, runs=2)
    (found,) = compare(["ssd-row"], 1, options)
    assert (
        len(found.ratios(0)) == 2 and 3 < found.ratio_of_bytes < 4 and 150 < found.mean_slots < 200
    )
    known = Comparison(2, "h2o", 179.0, [(6.0, 8.0), (9.0, 8.0)], [(2.0, 4.0), (2.0, 2.0)], 3.5)
    results = report([known], options)
    assert results["tables"][0]["rows"] == [
        ["2", "h2o", "179", "7500.0", "2000.0", "3.75", "3.00 to 4.50", "3.00", "3.50"]
    ]
    assert results["figures"] == {"h2o-2": "3.75"}
