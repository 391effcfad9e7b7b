"""The model of a step on GPUs that are not here: never under its bound, and by hand where that is
easy.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.kernel_code import GROUP, LAYER, PART
from benchmarks.step_model import GPUS, IN_FLIGHT, LATENCY, NODES_A_LAYER, Launch, StepModel
from ssd_export.bench.roofline import StepCost

GPU = replace(GPUS[0], bandwidth=1e12, rate=1e18, node_seconds=1e-6, multiprocessors=10)
MODEL = StepModel(
    GPU,
    {GROUP: 4, LAYER: 3, PART: 4},
    StepCost(10**9, 4 * 10**8, 10**9),
    launches=(Launch(2, 10**8), Launch(2, 3 * 10**8)),
    layer_of=(0, 0),
    most_slots=320,
)
PRODUCTS = 1e-3 + NODES_A_LAYER * 1e-6


def test_few_programs_read_no_faster_than_their_bytes_in_flight() -> None:
    attention = 4e8 / (2 * IN_FLIGHT / LATENCY)
    assert MODEL.attention == pytest.approx(attention)
    assert MODEL.seconds == pytest.approx(PRODUCTS + attention)
    assert MODEL.bound == pytest.approx(1.4e-3)


def test_a_launch_a_layer_has_the_programs_of_both_and_a_node_less() -> None:
    attention = 4e8 / (4 * IN_FLIGHT / LATENCY)
    assert MODEL.by_layer == pytest.approx(PRODUCTS + attention - 1e-6)


def test_no_more_programs_read_than_fit_at_once() -> None:
    launches = (Launch(100, 10**8), Launch(100, 3 * 10**8))
    many = replace(MODEL, gpu=replace(GPU, multiprocessors=5), launches=launches)
    assert many.by_layer == pytest.approx(PRODUCTS + 4e8 / (15 * IN_FLIGHT / LATENCY) - 1e-6)


def test_split_slots_fill_the_gpu_twice_and_need_a_node_more() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
    attention = 4e8 / (20 * IN_FLIGHT / LATENCY)
    assert MODEL.split == pytest.approx(PRODUCTS + attention)
    full = replace(MODEL, launches=(Launch(20, 10**8), Launch(20, 3 * 10**8)))
    assert full.split == full.by_layer


@pytest.mark.parametrize("programs", [1, 64, 4096])
def test_no_step_is_under_its_bound(programs: int) -> None:
    launches = tuple(replace(one, programs=programs) for one in MODEL.launches)
    model = replace(MODEL, launches=launches)
    assert model.bound <= min(model.seconds, model.split, model.by_layer)
