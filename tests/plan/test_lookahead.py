"""Which window pays: the cost of a pass, and the choice as drafts turn out."""

from __future__ import annotations

from ssd_export.plan.lookahead import OFF, WINDOWS, AutoWindow, PassCost, expected_widths

FULL_CACHE = list(range(576, 0, -1))  # no eviction ends a window
READING = PassCost(overhead=0.001, moving=1.0, computing=0.001)  # a large model at batch 1
COMPUTING = PassCost(overhead=0.001, moving=0.001, computing=1.0)  # many rows


def test_widths_of_passes_whose_drafts_are_always_or_never_right() -> None:
    always = expected_widths(FULL_CACHE, 8, 1.0)
    assert len(always) == 72 and sum(always) == 575 and always[-1] == 7
    assert len(expected_widths(FULL_CACHE, 8, 0.0)) == 575
    assert expected_widths([1] * 576, 8, 1.0) == [1] * 575, "an eviction before every step"
    middle = expected_widths(FULL_CACHE, 8, 0.8)
    assert len(middle) == 575 // sum(0.8**place for place in range(8)) + 1


def test_reading_memory_pays_for_wide_windows_and_arithmetic_for_none() -> None:
    assert AutoWindow(READING, FULL_CACHE)() == max(WINDOWS)
    assert AutoWindow(COMPUTING, FULL_CACHE)() == OFF
    assert AutoWindow(READING, [1] * 576)() == OFF, "a policy that evicts in every step"


def test_a_runner_that_writes_a_token_at_a_time_has_to_save_more() -> None:
    slow = PassCost(0.001, 1.0, 0.001, written=0.6)
    assert AutoWindow(slow, FULL_CACHE, share=0.3)() == OFF
    assert slow.of_window(8) > READING.of_window(8) + 4


def test_wrong_drafts_end_it_and_right_ones_bring_it_back() -> None:
    choose = AutoWindow(PassCost(0.4, 0.4, 0.2), FULL_CACHE)
    assert choose() != OFF
    for _ in range(60):
        choose.drafts(0, 1)
    assert choose() == OFF
    for _ in range(30):
        choose.drafts(4, 0)
    assert choose() != OFF
