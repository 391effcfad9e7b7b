"""The Triton kernel equals the torch reference: interpreted on the CPU in a separate process,
case by case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssd_export.cache.state import GroupState
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES
from tests.cases import CASES

pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
from ssd_export.kernels.decode_attention import decode_attention
from tests.kernels.interpret import ALL_CASES, wanted_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict[str, object]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpret"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {(line["case"], line["dtype"]): line for line in lines}


@pytest.mark.parametrize(("case", "dtype"), wanted_runs(), ids=map("-".join, wanted_runs()))
def test_kernel_equals_the_reference(interpreted: dict, case: str, dtype: str) -> None:
    result = interpreted[case, dtype]
    assert result["slots_equal"] and result["caches_equal"]
    assert result["out_error"] <= TOLERANCES[dtype].kernel
    assert result["score_error"] <= TOLERANCES["float32"].op


def test_the_table_is_covered_and_evictions_are_crossed(interpreted: dict) -> None:
    assert set(ALL_CASES) >= {case.name for case in CASES}
    without = {
        case
        for (case, _), result in interpreted.items()
        if not result.get("evicted") and case != "garbage"
    }
    assert without == {"full", "full-gqa"}


def test_garbage_is_not_written_outside_the_cache(interpreted: dict) -> None:
    assert interpreted["garbage", "float32"]["stays_inside"]


GROUP = HeadGroup(Rule(-1, 0, True), 9, 1, num_heads=2)


def call(**changed: torch.Tensor) -> None:
    state = GroupState.empty(3, GROUP, 8)
    given = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(3, 2, 8),
        "value": torch.zeros(3, 2, 8),
        "prompt_length": torch.zeros(3, dtype=torch.int32),
        "position": torch.zeros(3, dtype=torch.int64),
    }
    state.score = changed.pop("score", state.score)
    decode_attention(**(given | changed), state=state, policy=GroupPolicy(GROUP, 1.0, 4))


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
