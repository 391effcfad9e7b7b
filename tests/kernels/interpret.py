"""Runs the Triton kernels through Triton's interpreter beside the torch reference and prints how
far they are apart.

python -m tests.kernels.interpreted -m tests.kernels.interpret CASE... One JSON line for each form
of the kernel, case and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from ssd_export.cache import attention as reference
from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES, MODEL_DTYPES
from ssd_export.kernels import constants
from ssd_export.kernels.layer_attention import decode_layer
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from tests.cases import CASES, GUARDED, Case, Inputs, inputs

# The interpreter needs 15 ms for each head of each row: few steps, around the first eviction.
# float32 runs them all in every case; the other dtypes, which share every line of the integer work,
# the step that evicts in some.
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
FLOAT16_EVERY, BFLOAT16_EVERY = 2, 4  # cases: they differ in conversions alone
LAYER, PARTS = "a layer", "a layer in 3 parts"
# Blocks of a cache in parts, so that small ones have several: the kernel's are of 16 to 64 slots.
PART_BLOCKS = 6


def one_group(num_splits: int, *given: Any) -> Tensor:
    """The kernels of a layer on a layer of one group."""
    *token, state, policy, prompt_length, position = given
    return decode_layer(*token, [state], [policy], prompt_length, position, num_splits)


FORMS: dict[str, Callable[..., Tensor]] = {
    LAYER: partial(one_group, 1),
    PARTS: partial(one_group, 3),
}


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
        self,
        dtype: torch.dtype,
        attend: Callable[..., Tensor],
        only_eviction: bool = False,
    ) -> dict[str, object]:
        wanted, given = self.state.copied(torch.float32), self.state.copied(dtype)
        first, num_steps = self.step, STEPS_AROUND_EVICTION if dtype is torch.float32 else 2
        if only_eviction and self.step < self.case.steps - 1:
            self.run(self.step, wanted, reference.decode_attention)  # fills the last empty slot
            given, first, num_steps = wanted.copied(dtype), self.step + 1, 1
        result = {
            "slots_equal": True,
            "caches_equal": True,
            "out_error": 0.0,
            "score_error": 0.0,
            "evicted": 0,
        }
        for step in range(first, first + num_steps):
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


def garbage_stays_inside(attend: Callable[..., Tensor], name: str) -> bool:
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
    attend(token, token, token, state, case.policy, zeros, zeros + 9)
    return all(bool((buffer[-padding:] == 7).all()) for buffer in buffers)


class ThreeGroups:
    """A layer of groups with other rules, slots and numbers of heads: all of them over the steps in
    which they evict, beside the reference.
    """

    GROUPS = (
        HeadGroup(Rule(-1, 0, False), 13, 1, 1),
        HeadGroup(Rule(-1, 6, True, age_quota=True), 17, 6, 3),
        HeadGroup(Rule(2, 3, True, 1 << 2), 26, 5, 2),
    )
    ROWS, HEAD_DIM, MEMBERS, LENGTHS = 2, 16, 2, (4, 3)
    MOST_SLOTS = max(group.num_slots for group in GROUPS)

    def __init__(self) -> None:
        self.numbers = torch.Generator().manual_seed(5)
        self.lengths = torch.tensor(self.LENGTHS, dtype=torch.int32)
        self.policies = [GroupPolicy(group, 0.9, 6) for group in self.GROUPS]
        self.states = [GroupState.empty(self.ROWS, g, self.HEAD_DIM) for g in self.GROUPS]
        heads = sum(group.num_heads for group in self.GROUPS)
        self.heads = (heads * self.MEMBERS, heads, heads)

    def token(self) -> list[Tensor]:
        shapes = [(self.ROWS, heads, self.HEAD_DIM) for heads in self.heads]
        return [torch.randint(-64, 65, shape, generator=self.numbers) / 32 for shape in shapes]

    def compare(
        self, form: str, attend: Callable[..., Tensor], num_steps: int = 30
    ) -> dict[str, object]:
        """Every other step from the tenth on; the reference's states before each."""
        errors, slots_equal, evicted = [0.0], True, set()
        for step in range(num_steps):
            token, position = self.token(), self.lengths + step
            given = [state.copied(torch.float32) for state in self.states]
            before = [state.position.clone() for state in self.states]
            rest = self.policies, self.lengths, position
            out = reference.decode_layer(*token, self.states, *rest)
            evicted |= {
                place
                for place, state in enumerate(self.states)
                if bool(((before[place] >= 0) & (state.position != before[place])).any())
            }
            if step < 10 or step % 2:
                continue
            errors.append((attend(*token, given, *rest) - out).abs().max().item())
            for ours, wanted in zip(given, self.states, strict=True):
                slots_equal &= torch.equal(ours.position, wanted.position)
                slots_equal &= torch.equal(ours.key, wanted.key)
                slots_equal &= torch.equal(ours.value, wanted.value)
                if ours.score is not None:
                    error = (ours.score - wanted.score).masked_fill(wanted.position < 0, 0)
                    errors.append(error.abs().max().item())
        return {
            "form": form,
            "case": "three groups",
            "dtype": "float32",
            "slots_equal": slots_equal,
            "evicted": len(evicted),
            "error": max(errors),
        }


def wanted_runs() -> list[tuple[str, str]]:
    """(case, dtype) of every line of the kernel of a layer."""
    every = {"float32": 1, "float16": FLOAT16_EVERY, "bfloat16": BFLOAT16_EVERY}
    return [
        (name, row.name)
        for number, name in enumerate(ALL_CASES)
        for row in MODEL_DTYPES.values()
        if number % every[row.name] == every[row.name] // 2
    ]


def wanted_forms() -> list[tuple[str, str, str]]:
    """(form, case, dtype) of every line; in parts every case is run."""
    parts = [run for run in wanted_runs() if run[1] == "float32"]
    parts += [run for run in wanted_runs()[::9] if run[1] != "float32"]
    runs = {LAYER: wanted_runs(), PARTS: parts}
    return [(form, *run) for form, listed in runs.items() for run in listed]


@contextmanager
def small_blocks(num_slots: int) -> Iterator[None]:
    """Blocks of so few slots that a cache has PART_BLOCKS of them."""
    most = constants.MAX_BLOCK_SLOTS
    constants.MAX_BLOCK_SLOTS = min(next_power_of_2(-(-num_slots // PART_BLOCKS)), most)
    try:
        yield
    finally:
        constants.MAX_BLOCK_SLOTS = most


def results(names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        comparison = Comparison(ALL_CASES[name])
        for form, case, dtype in wanted_forms():
            if case == name:
                in_parts = form == PARTS
                with small_blocks(comparison.case.num_slots) if in_parts else nullcontext():
                    result = comparison.compare(DTYPES[dtype].torch, FORMS[form], in_parts)
                yield {"form": form, "case": name, "dtype": dtype, **result}
    for form, num_splits in ((LAYER, 1), (PARTS, 3)):
        with small_blocks(ThreeGroups.MOST_SLOTS):
            yield ThreeGroups().compare(form, partial(decode_layer, num_splits=num_splits))
    for form, attend in FORMS.items():
        stays = all(garbage_stays_inside(attend, name) for name in ("scored-every-6", "headkv"))
        yield {"form": form, "case": "garbage", "dtype": "float32", "stays_inside": stays}


if __name__ == "__main__":
    for line in results(sys.argv[1:] or list(ALL_CASES)):
        print(json.dumps(line), flush=True)
