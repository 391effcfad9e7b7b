"""The speed that `generate` reports: what is timed, what is counted, what the line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd_export.bench.roofline import step_cost
from ssd_export.bundle import open_bundle
from ssd_export.plan.step_speed import StepClock, read_bandwidth, speed_line, step_bytes, timed
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint


def ticks(*times: float) -> StepClock:
    """A clock of an image of 3 x 4 tokens that reads these times."""
    return StepClock(4, 12, iter(times).__next__)


def test_steps_that_other_work_stands_beside_are_left_out() -> None:
    """Opening after the prefill, images after a row, the prompt of the next batch."""
    clock = ticks(0, 50, 51, 52, 90, 91, 93, 94, 200, 260, 261)
    for done in (1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15):
        clock(done)
    assert clock.seconds == 1.0
    assert sorted(clock._seconds) == [1, 1, 1, 1, 1, 2]


def test_a_pass_of_several_tokens_counts_for_each() -> None:
    clock = ticks(0, 10, 16)
    for done in (1, 2, 4):
        clock(done)
    assert clock.seconds == 3.0


def test_nothing_is_said_where_no_step_was_seen_by_itself() -> None:
    clock = ticks(0, 1, 2)
    for done in (1, 4, 8):  # rows at once
        clock(done)
    assert clock.seconds is None


def test_only_the_stage_of_the_tokens_is_timed() -> None:
    told: list[tuple[str, int, int]] = []
    clock = ticks(0, 1, 2)
    progress = timed(lambda *all: told.append(all), clock)
    for stage, done in (("checking files", 7), ("generating 1 image", 2), ("prefill", 1)):
        progress(stage, done, 12)
    progress("generating 1 image", 3, 12)
    assert clock.seconds == 1.0 and len(told) == 4


@pytest.mark.parametrize("weights", ["none", "int4"])
def test_the_bytes_are_those_of_the_roofline(weights: str) -> None:
    """bench counts what the graph reads, generate what the weights file holds: the same."""
    opened = open_bundle(bundle(checkpoint(TinyJanus()), "full", 1.0, weights=weights))
    for num_images in (1, 3):
        cost = step_cost(opened, num_images)
        assert step_bytes(opened, num_images) == cost.weight_bytes + cost.cache_bytes


def test_bandwidth_is_that_of_the_array_that_is_read() -> None:
    times = iter(range(100))
    assert read_bandwidth(4000, 2, lambda: float(next(times))) == 4000.0
    assert read_bandwidth(1 << 22, 1) > 1e8


def test_the_line_says_speed_and_share() -> None:
    assert speed_line(0.15, 1, 600_000_000, 8e9) == (
        "decode step: 150 ms for 1 at once, 7 tokens/s, 50% of what memory allows (600 MB of"
        " weights and cache at 8 GB/s)"
    )


def test_a_bound_below_what_was_reached_is_no_bound() -> None:
    line = speed_line(0.001, 1, 8_000_000, 1.73e9)
    assert "over 100% of what memory allows" in line and "1.73 GB/s, slowed by other" in line


def test_generate_says_it_last(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ssd_export.cli.main import ssd_export

    path = bundle(checkpoint(TinyJanus()), "full", 1.0, weights="int8")
    asked = ["generate", "a red circle", "--bundle", str(path), "--out", str(tmp_path / "a.png")]
    done = CliRunner().invoke(ssd_export, [*asked, "--threads", "1"], standalone_mode=False)
    assert done.exception is None, done.exception
    line = done.stdout.splitlines()[-1]
    assert line.startswith("decode step: ") and "% of what memory allows" in line
    assert line.endswith("; ort, 1 thread, float32, weights int8, one token a pass")
