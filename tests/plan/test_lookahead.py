"""Which window pays: the cost of a pass, and the choice as drafts turn out."""

from __future__ import annotations

from dataclasses import replace

from ssd_export.bundle import open_bundle
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.plan.lookahead import OFF, WINDOWS, AutoWindow, PassCost, expected_widths
from ssd_export.plan.sizes import stored_weights
from ssd_export.plan.step_speed import packed_bytes

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


def chosen(cost: PassCost, rooms: list[int], share: float = 0.85, step: int = 1) -> int:
    return AutoWindow(cost, rooms, share)(step)


def test_reading_memory_pays_for_wide_windows_and_arithmetic_for_none() -> None:
    assert chosen(READING, FULL_CACHE) == max(WINDOWS)
    assert chosen(COMPUTING, FULL_CACHE) == OFF
    assert chosen(READING, [1] * 576) == OFF, "a policy that evicts in every step"
    could = [AutoWindow(cost, FULL_CACHE).could_pay for cost in (READING, COMPUTING)]
    assert could == [True, False]


def test_a_runner_that_writes_a_token_at_a_time_has_to_save_more() -> None:
    slow = PassCost(0.001, 1.0, 0.001, written=0.6)
    assert chosen(slow, FULL_CACHE, share=0.3) == OFF
    assert slow.of_window(8) > READING.of_window(8) + 4


def test_it_begins_when_drafts_are_right_and_ends_when_they_are_wrong() -> None:
    choose = AutoWindow(PassCost(0.4, 0.4, 0.2), FULL_CACHE)
    assert choose(1) == OFF, "nothing is known yet"
    for _ in range(8):
        choose.drafts(1, 0)
    assert choose(9) != OFF
    for _ in range(60):
        choose.drafts(0, 1)
    assert choose(90) == OFF
    for _ in range(30):
        choose.drafts(4, 0)
    assert choose(120) != OFF


def test_where_a_graph_is_opened_for_it_more_has_to_be_saved() -> None:
    """Near the border it stays as it is, and near the end of an image, too."""
    border = PassCost(0.2, 0.6, 0.2)
    share = next(n / 20 for n in range(21) if chosen(border, FULL_CACHE, n / 20) != OFF)
    dear = replace(border, opening=100)
    assert chosen(dear, FULL_CACHE, share) == OFF
    for window in (AutoWindow(dear, FULL_CACHE, 1.0), AutoWindow(border, FULL_CACHE, 1.0)):
        assert window(1) != OFF
        window.share = share - 0.05
        assert (window(2) != OFF) == (window.cost is dear)
    assert chosen(dear, FULL_CACHE, 1.0, step=1) != OFF
    assert chosen(dear, FULL_CACHE, 1.0, step=500) == OFF


def test_where_single_steps_have_operators_of_their_own_passes_have_to_give_more() -> None:
    """A pass of the same cost beside steps that take half the time."""
    plain = PassCost(0.4, 0.4, 0.02)
    fused = replace(plain, saved=0.41)
    assert fused.step == plain.step - 0.41 and fused.of_window(8) == plain.of_window(8)
    first = [
        next(n / 20 for n in range(21) if chosen(cost, FULL_CACHE, n / 20) != OFF)
        for cost in (plain, fused)
    ]
    assert first[1] > first[0] + 0.1, first


def test_the_cost_of_fused_steps_is_less_by_their_operators_and_packed_weights() -> None:
    with temporary_bundle(PolicyChoice()) as path:
        bundle = open_bundle(path)
        plain, fused = (
            PassCost.of(bundle, 1, 1, on_gpu=False, fuses_steps=fuses) for fuses in (False, True)
        )
        same = replace(fused, saved=0.0, moving=plain.moving, evicting=0.0)
        assert same == plain and fused.evicting > 0
        assert fused.moving < 0.7 * plain.moving and fused.saved > 0.5 * plain.overhead
        weights = stored_weights(bundle).items()
        matrices = [one.num_bytes for name, one in weights if len(one.shape) == 2]
        assert 0 < packed_bytes(bundle) < sum(matrices) / 2, "the demo came in float16"
        assert 1.7 < plain.step / fused.step < 3.5, "measured: 2.96 on a busy machine"
