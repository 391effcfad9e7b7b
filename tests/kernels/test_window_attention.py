"""The kernels of a window equal the torch reference: interpreted on the CPU in a separate process,
case by case.
"""

from __future__ import annotations

import pytest
import torch

from ssd_export.cache.state import GroupState
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES

pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
from ssd_export.kernels.window_attention import attend_layer_window
from tests.kernels.interpret import ALL_CASES, ThreeGroups
from tests.kernels.interpret_window import LAYER, wanted_windows
from tests.kernels.interpreted import interpreted_lines


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict[str, object]]:
    lines = interpreted_lines("-m", "tests.kernels.interpret_window")
    return {(line["case"], line["dtype"]): line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), wanted_windows(), ids=map("-".join, wanted_windows()))
def test_a_window_equals_the_reference(interpreted: dict, case: str, dtype: str) -> None:
    result = interpreted[case, dtype]
    assert result["slots_equal"], "of positions, keys and values"
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


@pytest.mark.slow
def test_evictions_and_rejected_tokens_are_among_the_cases(interpreted: dict) -> None:
    of_cases = [interpreted[name, "float32"] for name in ALL_CASES]
    without = {
        name for name, result in zip(ALL_CASES, of_cases, strict=True) if not result["evicted"]
    }
    assert without == {"full", "full-gqa"}
    assert sum(max(result["accepted"]) > 1 for result in of_cases) > len(of_cases) // 2
    assert all(max(result["accepted"]) < result["places"] for result in of_cases)
    layer = interpreted[LAYER, "float32"]
    assert len(ThreeGroups.GROUPS) == 3 and layer["evicted"] >= 1
    assert layer["accepted"] == [0, 2, 3], "a row that rests, two that go at their own pace"


def test_tensors_that_do_not_fit_are_named() -> None:
    group = HeadGroup(Rule(-1, 0, True), 9, 1, num_heads=2)
    state, policies = GroupState.empty(3, group, 8), [GroupPolicy(group, 1.0, 4)]
    numbers, active = torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.bool)
    query, token = torch.zeros(3, 4, 5, 8), torch.zeros(3, 2, 5, 8)
    with pytest.raises(ValueError, match="value is torch.float16"):
        attend_layer_window(query, token, token.half(), [state], policies, numbers, numbers, active)
    with pytest.raises(ValueError, match=r"1 caches and key \(3, 4, 8\)"):
        attend_layer_window(query, query, query, [state], policies, numbers, numbers, active)
