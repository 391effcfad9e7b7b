"""The soak's judgment: a leak is found, the steps of an allocator and a busy moment are none."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.soak import Sample, cycles, images, judged, results_of
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

MIB = 2**20


def samples(count: int = 250) -> list[Sample]:
    """A process that is warm after some calls, with the noise of an allocator and of a clock."""
    chance = random.Random(0)
    return [
        Sample(
            100 * MIB + min(number, 20) * MIB + chance.choice((0, 0, 2 * MIB)),
            12,
            3,
            0.5 + chance.uniform(-0.1, 0.1) + (3 if number == 77 else 0),
        )
        for number in range(count)
    ]


def test_a_level_process_is_level() -> None:
    found = judged("x", samples())
    assert found["ok"], found


@pytest.mark.parametrize(
    "field, a_sample",
    [("resident", 27_648), ("descriptors", 0.01), ("threads", 0.01), ("seconds", 0.0005)],
)
def test_a_leak_is_found(field: str, a_sample: float) -> None:
    """27,648 bytes a call: the pixels of one image."""
    leaking = [
        replace(one, **{field: getattr(one, field) + a_sample * number})
        for number, one in enumerate(samples())
    ]
    found = judged("x", leaking)
    assert [name for name, level in found["level"].items() if not level] == [field]
    assert results_of([found])["figures"] == {"level": "no"}


@pytest.mark.slow
def test_a_few_images_and_cycles() -> None:
    path = bundle(checkpoint(TinyJanus(num_layers=1)), "h2o", 0.1)
    generated, opened = list(images(path, 6, 2)), list(cycles(path, 3))
    assert len(generated) == 3 and len(opened) == 3
    assert all(one.seconds > 0 and one.descriptors > 2 for one in (*generated, *opened))
    assert opened[-1].descriptors == opened[0].descriptors
