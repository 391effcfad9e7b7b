"""The decode loop: every step once and in order, evictions where the schedule says, however the
steps are cut into parts.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_export.model.families.janus import GRID
from ssd_export.noise import ImageSeed
from ssd_export.policy.schedule import eviction_steps
from ssd_export.policy.table import HeadGroup, PolicyTable, Rule
from ssd_export.runtime.loop import decode, grid_rows, single_steps
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from ssd_export.sampling import Sampling

GROUP = HeadGroup(Rule(-1, 20, True), num_slots=100, evict_every=12, num_heads=2)
TABLE = PolicyTable("h2o", 0.2, 32, 1.0, GRID, ((GROUP,),), head_order=((0, 1),))


class RecordingRunner(Runner):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def prefill(self, batch: PromptBatch) -> None:
        self.calls.append(("prefill", 0))

    def evict(self, step: int) -> None:
        self.calls.append(("evict", step))

    def decode_step(self, step: int) -> None:
        self.calls.append(("step", step))

    def steps(self, what: str) -> list[int]:
        return [step for name, step in self.calls if name == what]


def batch(*lengths: int) -> PromptBatch:
    embeds = np.zeros((2, 1, 1), np.float32)
    return PromptBatch(embeds, np.array(lengths, np.int32), (ImageSeed(0, 0),), (Sampling(),))


@given(st.lists(st.integers(1, 575), max_size=8), st.integers(5, 32))
def test_parts_change_nothing_but_where_the_caller_looks(cuts: list[int], length: int) -> None:
    edges = sorted({1, 576, *cuts})
    parts = [range(*pair) for pair in zip(edges, edges[1:])]
    runner = RecordingRunner()
    assert list(decode(runner, batch(length, 32), TABLE, parts)) == [range(1), *parts]
    assert runner.calls[0] == ("prefill", 0) and runner.steps("step") == list(range(1, 576))
    due = eviction_steps(TABLE, [length, 32])
    assert runner.steps("evict") == sorted(due)
    for step in due:
        assert runner.calls[runner.calls.index(("evict", step)) + 1] == ("step", step)


def test_the_caller_decides_how_far_it_goes() -> None:
    runner = RecordingRunner()
    loop = decode(runner, batch(8, 8), TABLE)
    assert runner.calls == []
    assert next(loop) == range(1) and runner.calls == [("prefill", 0)]
    assert next(loop) == range(1, 24)
    loop.close()
    assert runner.steps("step") == list(range(1, 24))


@pytest.mark.parametrize("first", [1, 23, 24, 25, 300, 575])
def test_rows_and_steps_cover_what_is_left(first: int) -> None:
    for parts in (grid_rows(TABLE.grid, first), single_steps(576, first)):
        assert [step for part in parts for step in part] == list(range(first, 576))
        assert all(len({step // 24 for step in part}) == 1 for part in parts)
    assert len(grid_rows(TABLE.grid)) == 24 and single_steps(1) == []
