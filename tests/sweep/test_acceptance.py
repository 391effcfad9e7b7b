"""The goals are judged by the rows alone, caption by caption, and only where there is something to
judge.
"""

from __future__ import annotations

import numpy as np
import pytest

from ssd_export.sweep.acceptance import goal_figures, goal_table, paired_cases, ratio_of_means


def row(policy: str, budget: float, ok: str, seeds: tuple[int, ...] = (0,)) -> dict[str, object]:
    return {
        "policy": policy,
        "budget": budget,
        "ok": ok,
        "seeds": list(seeds),
        "image_slots_mean": 576 * budget,
    }


def reached(rows: list[dict[str, object]]) -> dict[str, tuple[str | None, str | None]]:
    found = goal_table(rows)
    assert found is not None
    return {line[0]: (line[1], line[3]) for line in found["rows"]}


def test_what_is_kept_and_what_is_beaten() -> None:
    full, same, worse = "1" * 80 + "0" * 20, "1" * 79 + "0" * 21, "1" * 40 + "0" * 60
    rows = [
        row("full", 1.0, full),
        row("ssd-auto", 0.2, same),
        row("h2o", 0.2, same),
        row("streaming-llm", 0.2, worse),
        row("ssd-auto", 0.1, worse),
    ]
    found = reached(rows)
    assert found["keeps 98 % of the full cache's score at 0.2"] == (
        "98.8 % ± 2.4 (79.0 of 80.0)",
        "yes",
    )
    assert found["keeps 95 % of the full cache's score at 0.1"][1] == "no"
    assert found["above h2o at 0.2"] == (
        "+0.0 ± 0.0 points (115.2 and 115.2 slots)",
        "no",
    )  # equal is not above
    measured, above = found["above streaming-llm at 0.2"]
    assert above == "yes" and measured is not None and measured.startswith("+39.0 ± 9.6 points")
    assert found["above h2o at 0.1"] == (None, None)
    figures = goal_figures(rows)
    assert figures["kept-0.2"] == "98.8 % ± 2.4" and figures["above-h2o-0.2"] == "+0.0 ± 0.0 points"
    assert sorted(figures) == ["above-h2o-0.2", "above-streaming-llm-0.2", "kept-0.1", "kept-0.2"]


def test_a_small_lead_within_the_interval_is_no_lead() -> None:
    rng = np.random.default_rng(0)
    one, other = ("".join(map(str, rng.integers(0, 2, 100))) for _ in range(2))
    lead = sum(map(int, one)) - sum(map(int, other))
    first, second = (one, other) if lead > 0 else (other, one)
    rows = [row("full", 1.0, first), row("ssd-auto", 0.2, first), row("h2o", 0.2, second)]
    assert 0 < abs(lead) < 15 and reached(rows)["above h2o at 0.2"][1] == "no"


def test_only_seeds_that_both_have_are_compared() -> None:
    assert paired_cases(row("a", 0.1, "110011", (0, 1, 2)), row("b", 0.1, "0110", (0, 2))) == (
        [1, 1, 1, 1],
        [0, 1, 1, 0],
    )


def test_without_the_full_cache_or_the_default_policy_there_is_nothing_to_judge() -> None:
    assert goal_table([row("full", 1.0, "1"), row("h2o", 0.2, "1")]) is None
    assert goal_figures([row("full", 1.0, "1")]) == {}
    assert (
        goal_table([{"policy": "full", "budget": 1.0, "kl": 0.0}, row("ssd-auto", 0.2, "1")])
        is None
    )


def test_the_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(1)
    base = rng.random((4000, 200)) < 0.8
    own = base & (rng.random(base.shape) < 0.95)
    ratios = own.mean(axis=1) / base.mean(axis=1)
    errors = [
        ratio_of_means(a, b).standard_error
        for a, b in zip(
            own[:50].astype(float).tolist(), base[:50].astype(float).tolist(), strict=True
        )
    ]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.1)
    assert np.isnan(ratio_of_means([0.0], [0.0]).value)
    assert ratio_of_means([1.0, 0.0], [1.0, 1.0]).value == 0.5
