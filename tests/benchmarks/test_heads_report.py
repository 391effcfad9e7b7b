"""The tables say what the cells hold: paired differences, slots, and what could not be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.heads_report import (
    AUTO,
    BUDGETS,
    GROUPS,
    RIVALS,
    ROW,
    SWAPPED,
    mean_of,
    permutations,
    policies,
    report,
)
from ssd_export.sweep.policy_variant import Variant
from ssd_export.sweep.sweep import SweepResult
from tests.policy.test_allocation import head_map
from tests.policy.test_make import GQA, GQA_METRIC

NUM_RANDOM = 3
COSTS = replace(head_map(3, 2), num_heads=6, hidden_size=GQA.hidden_size, metric=GQA_METRIC)
POLICIES = policies(NUM_RANDOM)
CONTROLS = (mean_of(NUM_RANDOM), SWAPPED, *permutations(NUM_RANDOM))


def result(**generated: list[int]) -> SweepResult:
    """Losses of 8 scenes that differ much among themselves and little between policies."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, 8)
    nothing = {"losses": base.tolist(), "kl": [0.0] * 8}
    cells = [{"policy": "full", "budget": 1.0, "image_slots_mean": 576.0, **nothing, **generated}]
    for place, policy in enumerate(POLICIES):
        for budget in BUDGETS:
            kl = 0.01 * place + 0.001 / budget + rng.normal(0, 1e-4, 8)
            numbers = {"losses": (base + kl).tolist(), "kl": kl.tolist()}
            cells.append(
                {
                    "policy": policy,
                    "budget": budget,
                    "image_slots_mean": 576 * budget,
                    **numbers,
                    **generated,
                }
            )
    return SweepResult({"model": "demo"}, cells, {"margin-b0.05": "a larger budget"})


def table(tables: list[dict], title: str) -> dict[str, list[str]]:
    found = next(one for one in tables if title in one["title"])
    return {row[0]: row[1:] for row in found["rows"]}


def test_every_policy_can_be_asked_for() -> None:
    assert len({Variant.parse(name).name for name in POLICIES}) == len(POLICIES)


def test_differences_are_taken_scene_by_scene() -> None:
    tables = report(result(), COSTS, GQA, NUM_RANDOM)["tables"]
    losses = table(tables, "What a policy loses")
    assert list(losses) == [AUTO, *GROUPS, *RIVALS, *CONTROLS]
    slots, loss, kl = losses[AUTO][:3]
    assert slots == "57.6" and loss == f"+{kl}"  # what all scenes have in common is in neither
    assert (
        float(kl.split(" ± ")[0]) == pytest.approx(10, abs=0.2) and float(kl.split(" ± ")[1]) < 0.1
    )
    for title in ("Loss under ssd-auto", "KL under ssd-auto"):
        paired = table(tables, title)
        for rival in RIVALS:
            difference, errors = paired[rival][0].split(" (")
            assert -10 * POLICIES.index(rival) == pytest.approx(
                float(difference.split(" ")[0]), abs=0.3
            )
            assert float(errors[:-1]) < -50
        assert float(paired[ROW][2].split(" ")[0]) == pytest.approx(-35, abs=0.3)  # 0.1 less 0.2
    assert list(table(tables, "measured head types")) == list(CONTROLS)
    assert table(tables, "Not measured") == {"margin-b0.05": ["a larger budget"]}


def test_scores_stand_beside_losses_where_images_were_generated() -> None:
    whole = report(result(ok=[1, 0, 1, 1]), COSTS, GQA, NUM_RANDOM)
    assert whole["tables"][0]["columns"][-4:] == [
        "slots at 0.2",
        "loss at 0.2",
        "KL at 0.2",
        "score at 0.2",
    ]
    assert table(whole["tables"], "What a policy loses")[AUTO][-1] == "75.0 % (+0.0 ± 0.0)"
    assert (
        whole["figures"]["semantic_heads"].endswith(" of 6")
        and whole["figures"]["stability"] == "not known"
    )
    assert len(whole["cells"]) == 1 + 2 * len(POLICIES) and len(whole["cells"][0]["losses"]) == 8


def test_permutations_are_averaged_scene_by_scene() -> None:
    whole = report(result(), COSTS, GQA, NUM_RANDOM)["tables"]
    controls = table(whole, "measured head types")
    assert list(controls) == list(CONTROLS)
    each = [float(controls[name][2].split(" ")[0]) for name in permutations(NUM_RANDOM)]
    mean, errors = controls[mean_of(NUM_RANDOM)][2].split(" (")
    assert (
        float(mean.split(" ")[0]) == pytest.approx(sum(each) / 3, abs=0.002)
        and float(errors[:-1]) < -500
    )
    fewer = SweepResult(
        {}, [cell for cell in result().cells if cell["policy"] != permutations(1)[0]], {}
    )
    rows = table(report(fewer, COSTS, GQA, NUM_RANDOM)["tables"], "measured head types")
    assert rows[mean_of(NUM_RANDOM)] == [None] * 4


def test_head_types_are_compared_by_what_the_map_predicts_too() -> None:
    """Every option costs every head the same, but windows serve the semantic ones badly."""
    costs = np.ones(np.shape(COSTS.costs))
    windows = np.array([not option.rule.by_score for option in COSTS.cost_options])
    costs[np.asarray(COSTS.semantic())[..., None] & windows] = 10
    dear = replace(COSTS, costs=tuple(tuple(map(tuple, layer)) for layer in costs.tolist()))
    rows = table(report(result(), dear, GQA, NUM_RANDOM)["tables"], "predicts")
    for budget in BUDGETS:
        own, swapped, permuted, better = rows[f"{budget}"]
        assert (
            float(own) < float(permuted.split(" ± ")[0]) < float(swapped) and better == "0 of 200"
        )


def test_a_policy_without_a_table_is_not_run() -> None:
    whole = result()
    missing = SweepResult(
        whole.settings, [cell for cell in whole.cells if cell["policy"] != "linear"], {}
    )
    assert (
        table(report(missing, COSTS, GQA, NUM_RANDOM)["tables"], "What a policy loses")["linear"]
        == [None] * 6
    )
    assert (
        table(report(missing, COSTS, GQA, NUM_RANDOM)["tables"], "KL under ssd-auto")["linear"]
        == [None] * 3
    )
