"""The model of a step on GPUs that are not here: never under its bound, and by hand where that is
easy.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.kernel_code import LAYER, PART
from benchmarks.step_model import GPUS, IN_FLIGHT, LATENCY, NODES_A_LAYER, Launch, StepModel
from ssd_export.bench.roofline import StepCost

pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")

GPU = replace(GPUS[0], bandwidth=1e12, rate=1e18, node_seconds=1e-6, multiprocessors=10)
MODEL = StepModel(
    GPU,
    {LAYER: 3, PART: 4},
    StepCost(10**9, 4 * 10**8, 10**9),
    launches=(Launch(4, 4 * 10**8),),
    most_slots=320,
)
PRODUCTS = 1e-3 + NODES_A_LAYER * 1e-6
ONE_EACH = replace(MODEL, gpu=replace(GPU, multiprocessors=3))


def test_few_programs_read_no_faster_than_their_bytes_in_flight() -> None:
    attention = 4e8 / (4 * IN_FLIGHT / LATENCY)
    assert ONE_EACH.num_splits == 1 and ONE_EACH.attention == pytest.approx(attention)
    assert MODEL.not_split == ONE_EACH.seconds == pytest.approx(PRODUCTS + attention)
    assert MODEL.bound == pytest.approx(1.4e-3)


def test_no_more_programs_read_than_fit_at_once() -> None:
    many = replace(ONE_EACH, launches=(Launch(200, 4 * 10**8),))
    assert many.seconds == pytest.approx(PRODUCTS + 4e8 / (9 * IN_FLIGHT / LATENCY))


def test_split_slots_fill_the_gpu_twice_and_need_a_node_more() -> None:
    attention = 4e8 / (20 * IN_FLIGHT / LATENCY)
    assert MODEL.num_splits == 5
    assert MODEL.seconds == pytest.approx(PRODUCTS + attention + 1e-6)
    full = replace(MODEL, launches=(Launch(40, 4 * 10**8),))
    assert full.num_splits == 1 and full.seconds == full.not_split


@pytest.mark.parametrize("programs", [1, 64, 4096])
def test_no_step_is_under_its_bound(programs: int) -> None:
    model = replace(MODEL, launches=(replace(MODEL.launches[0], programs=programs),))
    assert model.bound <= min(model.seconds, model.not_split)
