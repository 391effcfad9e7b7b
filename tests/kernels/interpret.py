"""Runs the Triton kernel through Triton's interpreter beside the torch reference and prints how far
they are apart.

A separate process (TRITON_INTERPRET=1 python -m tests.kernels.interpret CASE...): Triton's
interpreter and compiler do not mix. One JSON line for each case and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssd_export.cache import attention as reference
from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES, MODEL_DTYPES
from ssd_export.kernels.decode_attention import decode_attention
from tests.cases import CASES, GUARDED, Case, Inputs, inputs

# The interpreter needs 30 ms for each head of each row: few steps, around the first eviction.
# float32 runs them all; the other dtypes, which share every line of the integer work, the step that
# evicts.
STEPS_AROUND_EVICTION = 3
BIG_CASES = (
    Case("head-dim-16-gqa-2", GUARDED, 21, 6, query_group_size=2, head_dim=16, steps=30, seed=201),
    Case("head-dim-32", GUARDED, 40, 24, num_heads=1, head_dim=32, steps=60, seed=202),
    Case(
        "head-dim-128",
        GUARDED,
        75,
        24,
        num_heads=1,
        head_dim=128,
        prompt_lengths=(5,),
        steps=75,
        seed=203,
    ),
    Case(
        "1030-slots",
        GUARDED,
        1030,
        6,
        num_heads=1,
        head_dim=64,
        prompt_slots=900,
        prompt_lengths=(899,),
        steps=134,
        seed=204,
    ),
)
ALL_CASES = {case.name: case for case in (*CASES, *BIG_CASES)}
BFLOAT16_EVERY = 4  # cases: the interpreter differs from float16 in the last conversion alone


class Comparison:
    """One case: the reference in float32 runs ahead to the step before an eviction, then both run
    step by step.
    """

    def __init__(self, case: Case) -> None:
        self.case = replace(case, steps=min(case.steps, 134))
        self.data = Inputs(
            **{name: torch.from_numpy(array) for name, array in vars(inputs(self.case)).items()}
        )
        data, self.state = self.data, GroupState.empty(case.rows, case.group, case.head_dim)
        _, scores = reference.prefill_attention(
            data.prompt_query, data.prompt_key, data.prompt_value, data.prompt_length
        )
        reference.fill_from_prompt(
            self.state, data.prompt_key, data.prompt_value, scores, data.prompt_length
        )
        self.step = 0
        while (
            self.step < self.case.steps - STEPS_AROUND_EVICTION and not self.is_next_to_eviction()
        ):
            self.run(self.step, self.state, reference.decode_attention)
            self.step += 1

    def is_next_to_eviction(self) -> bool:
        """Whether a head has one empty slot left: the next step fills it, the one after
        evicts.
        """
        return bool(((self.state.position < 0).sum(-1) <= 1).any())

    def run(self, step: int, state: GroupState, attend: Callable[..., Tensor]) -> Tensor:
        data, case, dtype = self.data, self.case, state.key.dtype
        # Heads as the model has them: a slice of a larger tensor, rows apart.
        query, key, value = (
            torch.cat([part, part[:, :1]], dim=1).to(dtype)[:, : part.shape[1]]
            for part in (data.query[step], data.key[step], data.value[step])
        )
        position = data.prompt_length + step
        return attend(
            query,
            key,
            value,
            state,
            case.policy,
            data.prompt_length,
            position,
        )

    def compare(
        self, dtype: torch.dtype, attend: Callable[..., Tensor] = decode_attention
    ) -> dict[str, object]:
        wanted, given = self.state.copied(torch.float32), self.state.copied(dtype)
        num_steps = STEPS_AROUND_EVICTION if dtype is torch.float32 else 2
        result = {
            "slots_equal": True,
            "caches_equal": True,
            "out_error": 0.0,
            "score_error": 0.0,
            "evicted": 0,
        }
        for step in range(self.step, self.step + num_steps):
            before = wanted.position.clone()
            out = self.run(step, wanted, reference.decode_attention)
            kernel_out = self.run(step, given, attend)
            result["evicted"] += int(((before >= 0) & (wanted.position != before)).any())
            result["slots_equal"] &= torch.equal(given.position, wanted.position)
            result["caches_equal"] &= torch.equal(given.key.float(), wanted.key)
            result["caches_equal"] &= torch.equal(given.value.float(), wanted.value)
            result["out_error"] = max(
                result["out_error"], (kernel_out.float() - out).abs().max().item()
            )
            if wanted.score is not None:
                error = (given.score - wanted.score).masked_fill(wanted.position < 0, 0)
                result["score_error"] = max(
                    result["score_error"], (error.abs() / wanted.score.clamp(1)).max().item()
                )
        return result


def garbage_stays_inside(name: str) -> bool:
    """Whether a full cache of NaN scores is served without a write outside of it (an engine builder
    times on garbage).
    """
    case = ALL_CASES[name]
    heads, padding = case.rows * case.num_heads, 1000
    buffers = [
        torch.full((heads * case.num_slots * width + padding,), 7.0, dtype=dtype)
        for width, dtype in (
            (case.head_dim, torch.float32),
            (case.head_dim, torch.float32),
            (1, torch.int32),
            (1, torch.float32),
        )
    ]
    shape = (case.rows, case.num_heads, case.num_slots)
    parts = [buffer[:-padding].view(*shape, -1) for buffer in buffers]
    parts[3].fill_(float("nan"))
    state = GroupState(parts[0], parts[1], parts[2][..., 0], parts[3][..., 0])
    token = torch.ones(case.rows, case.num_heads, case.head_dim)
    zeros = torch.zeros(case.rows, dtype=torch.int32)
    decode_attention(token, token, token, state, case.policy, zeros, zeros + 9)
    return all(bool((buffer[-padding:] == 7).all()) for buffer in buffers)


def wanted_runs() -> list[tuple[str, str]]:
    """(case, dtype) of every line."""
    some = [name for number, name in enumerate(ALL_CASES) if number % BFLOAT16_EVERY == 2]
    return [
        (name, dtype)
        for name in ALL_CASES
        for dtype in (row.name for row in MODEL_DTYPES.values())
        if dtype != "bfloat16" or name in some
    ]


def results(names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        comparison = Comparison(ALL_CASES[name])
        for case, dtype in wanted_runs():
            if case == name:
                yield {"case": name, "dtype": dtype, **comparison.compare(DTYPES[dtype].torch)}
    stays = all(map(garbage_stays_inside, ("scored-every-6", "headkv")))
    yield {"case": "garbage", "dtype": "float32", "stays_inside": stays}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):  # the interpreter computes masked lanes, too
        for line in results(sys.argv[1:] or list(ALL_CASES)):
            print(json.dumps(line), flush=True)
