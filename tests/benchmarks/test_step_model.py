"""The model of a step on GPUs that are not here: never under its bound, and by hand where that is
easy.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.step_model import GPUS, IN_FLIGHT, LATENCY, NODES_A_LAYER, Launch, StepModel
from ssd_export.bench.roofline import StepCost

GPU = replace(GPUS[0], bandwidth=1e12, rate=1e18, node_seconds=1e-6, multiprocessors=10)
MODEL = StepModel(
    GPU, 4, StepCost(10**9, 4 * 10**8, 10**9), (Launch(2, 2 * 10**8), Launch(2, 2 * 10**8)), 1
)
NODES = NODES_A_LAYER * 1e-6


def test_few_programs_read_no_faster_than_their_bytes_in_flight() -> None:
    attention = 4e8 / (2 * IN_FLIGHT / LATENCY)
    assert MODEL.attention == pytest.approx(attention)
    assert MODEL.seconds == pytest.approx(1e-3 + attention + NODES)
    assert MODEL.bound == pytest.approx(1.4e-3)


def test_split_slots_fill_the_gpu() -> None:
    assert MODEL.split == pytest.approx(1e-3 + 4e8 / 1e12 + NODES)


def test_one_launch_has_the_programs_of_both_and_a_node_less() -> None:
    attention = 4e8 / (4 * IN_FLIGHT / LATENCY)
    assert MODEL.one_launch == pytest.approx(1e-3 + attention + NODES - 1e-6)


@pytest.mark.parametrize("programs", [1, 64, 4096])
def test_no_step_is_under_its_bound(programs: int) -> None:
    launches = tuple(replace(one, programs=programs) for one in MODEL.launches)
    model = replace(MODEL, launches=launches)
    assert model.bound <= min(model.seconds, model.split, model.one_launch)
