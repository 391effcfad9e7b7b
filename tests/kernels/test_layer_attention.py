"""The Triton kernel equals the torch reference: interpreted on the CPU in a separate process,
case by case.
"""

from __future__ import annotations

import pytest
import torch

from ssd_export.cache.state import GroupState
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES
from tests.cases import CASES

pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
from ssd_export.kernels.constants import splits
from ssd_export.kernels.layer_attention import decode_layer
from tests.kernels.interpret import ALL_CASES, FORMS, LAYER, PARTS, wanted_forms
from tests.kernels.interpreted import interpreted_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str, str], dict[str, object]]:
    lines = interpreted_lines("-m", "tests.kernels.interpret")
    return {(line["form"], line["case"], line["dtype"]): line for line in lines}


@pytest.mark.parametrize(
    ("form", "case", "dtype"), wanted_forms(), ids=map("-".join, wanted_forms())
)
def test_kernel_equals_the_reference(interpreted: dict, form: str, case: str, dtype: str) -> None:
    result = interpreted[form, case, dtype]
    assert result["slots_equal"] and result["caches_equal"]
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


@pytest.mark.parametrize("form", [LAYER, PARTS])
def test_the_table_is_covered_and_evictions_are_crossed(interpreted: dict, form: str) -> None:
    assert set(ALL_CASES) >= {case.name for case in CASES}
    assert {case for ran, case, _ in interpreted if ran == form} >= set(ALL_CASES)
    without = {
        case
        for (ran, case, _), result in interpreted.items()
        if ran == form and "slots_equal" in result and not result["evicted"]
    }
    assert without == {"full", "full-gqa"}


@pytest.mark.parametrize("form", [LAYER, PARTS])
def test_groups_of_a_layer_are_served_by_one_launch(interpreted: dict, form: str) -> None:
    result = interpreted[form, "three groups", "float32"]
    assert result["slots_equal"] and result["evicted"] == 3
    assert result["error"] <= TOLERANCES["float32"].kernel


@pytest.mark.parametrize("form", FORMS)
def test_garbage_is_not_written_outside_the_cache(interpreted: dict, form: str) -> None:
    assert interpreted[form, "garbage", "float32"]["stays_inside"]


@pytest.mark.parametrize(
    ("programs", "num_blocks", "multiprocessors", "wanted"),
    [
        (32, 40, 132, 8),  # an image of Janus-Pro-1B on an H200
        (256, 40, 132, 1),
        (263, 40, 132, 1),
        (32, 12, 16, 1),  # on an Orin
        (2, 12, 132, 12),
        (1, 99, 132, 32),
    ],
)
def test_slots_are_split_where_heads_do_not_fill_the_gpu(
    programs: int, num_blocks: int, multiprocessors: int, wanted: int
) -> None:
    assert splits(programs, num_blocks, multiprocessors) == wanted


def test_a_layer_s_tensors_that_do_not_fit_are_named() -> None:
    states, token = [GroupState.empty(3, OF_TWO, 8)] * 2, torch.zeros(3, 2, 8)
    numbers = torch.zeros(3, dtype=torch.int32)
    policies = [GroupPolicy(OF_TWO, 1.0, 4)] * 2
    with pytest.raises(ValueError, match=r"2 caches and key \(3, 2, 8\) for 2 head groups of 4"):
        decode_layer(token, token, token, states, policies, numbers, numbers)
    with pytest.raises(ValueError, match="value is torch.float16"):
        decode_layer(token, token, token.half(), states[:1], policies[:1], numbers, numbers)


OF_TWO = HeadGroup(Rule(-1, 0, True), 9, 1, num_heads=2)


def call(**changed: torch.Tensor) -> None:
    state = GroupState.empty(3, OF_TWO, 8)
    given = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(3, 2, 8),
        "value": torch.zeros(3, 2, 8),
        "prompt_length": torch.zeros(3, dtype=torch.int32),
        "position": torch.zeros(3, dtype=torch.int64),
    }
    state.score = changed.pop("score", state.score)
    policy = GroupPolicy(OF_TWO, 1.0, 4)
    decode_layer(**(given | changed), states=[state], policies=[policy])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(3, 5, 8)}, "no whole number of query heads for 2 KV heads"),
        ({"query": torch.zeros(12, 8)}, "no whole number of query heads"),
        (
            {"query": torch.zeros(3, 4, 7)},
            r"query is .* \(3, 4, 7\) .* wants torch.float32 \(3, 4, 8\)",
        ),
        ({"key": torch.zeros(3, 2, 8, dtype=torch.float16)}, "key is torch.float16"),
        ({"value": torch.zeros(2, 3, 8).transpose(0, 1)}, "heads of a row must be contiguous"),
        ({"position": torch.zeros(3)}, "position is torch.float32"),
        (
            {"prompt_length": torch.zeros(2, dtype=torch.int32)},
            r"prompt_length is torch.int32 \(2,\)",
        ),
        ({"score": torch.zeros(3, 9, 2).transpose(1, 2)}, "cache tensors must be contiguous"),
        ({"score": torch.zeros(3, 2, 9, dtype=torch.float16)}, "cached score is torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)
