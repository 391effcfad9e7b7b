"""The Triton kernels against the torch reference, step by step over evictions (R3 to R7), on the
device that runs it.

    python -m benchmarks.kernel_check [--quick]

needs a GPU and torch for CUDA. `--quick`, one case of each kind, is what gpu_report runs under
compute-sanitizer. Before every compared step the kernel is given the reference's state, so a
difference shows where it arises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd_export.cache import attention as reference
from ssd_export.cache.state import GroupState
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from ssd_export.verify.tolerances import TOLERANCES

TIE = 1e-4  # relative: of scores nearer than this either token may go
COMPARED = 4  # steps after the first head is full
LENGTHS = (7, 5, 7, 2)  # of the prompts, one row each


@dataclass(frozen=True)
class KernelCase:
    """A head group, its dtype and how many steps it is driven."""

    name: str
    group: HeadGroup
    head_dim: int = 64
    query_group_size: int = 1
    score_decay: float = 1.0

    @property
    def policy(self) -> GroupPolicy:
        """The group in its table."""
        return GroupPolicy(self.group, self.score_decay, GRID.width)


def _case(
    name: str, rule: Rule, num_slots: int, evict_every: int = 1, num_heads: int = 4, **others: Any
) -> KernelCase:
    return KernelCase(name, HeadGroup(rule, num_slots, evict_every, num_heads), **others)


GUARDED = Rule(-1, 16, True)
CASES = (
    _case("never full", Rule(-1, 0, False), 640),
    _case("ring", Rule(-1, 0, False), 72, head_dim=128),
    _case("four sinks", Rule(4, 0, False), 72),
    _case("scored, one at a time", GUARDED, 96),
    _case("scored, row by row", GUARDED, 180, 24, num_heads=16, head_dim=128),
    _case("scored, grouped queries", GUARDED, 96, 6, num_heads=2, query_group_size=4),
    _case("decay 0", Rule(-1, 0, True), 96, score_decay=0.0),
    _case("decay 0.9", GUARDED, 96, 6, score_decay=0.9),
    _case("pinned columns", Rule(-1, 0, False, 1 | 1 << 22 | 1 << 23), 7 + 72 + 24, 24),
    _case("age quota", Rule(-1, 16, True, age_quota=True), 96, 7),
    _case("age quota, one at a time", Rule(-1, 16, True, age_quota=True), 96),
    _case("odd sizes", Rule(3, 5, True), 67, 7, num_heads=5, head_dim=24),
)
QUICK = ("ring", "scored, row by row", "scored, grouped queries")


Attention = Callable[..., Tensor]  # with the arguments of cache.attention.decode_attention


def kernels() -> dict[str, Attention]:
    """The kernels of a layer on a layer of one group: whole, and with the slots in parts.

    Raises: ImportError without Triton.
    """
    from ssd_export.kernels.layer_attention import decode_layer

    def one_group(num_splits: int, *given: Any) -> Tensor:
        *token, state, policy, prompt_length, position = given
        return decode_layer(*token, [state], [policy], prompt_length, position, num_splits)

    return {f"{n} part(s)": partial(one_group, n) for n in (1, 3)}


def check_kernel(
    device: str,
    cases: tuple[KernelCase, ...] = CASES,
    kernels: Callable[[], dict[str, Attention]] = kernels,
) -> dict[str, Any]:
    """{"ok", "steps", "evicted", "ties", "out_error" and "score_error" by dtype, "failures"}.

    Raises: ImportError without Triton.
    """
    result: dict[str, Any] = {
        "ok": True,
        "steps": 0,
        "evicted": 0,
        "ties": 0,
        "out_error": {},
        "score_error": {},
        "failures": [],
    }
    for case in cases:
        for dtype in TOLERANCES:
            _check_case(case, dtype, device, kernels(), result)
    result["ok"] = not result["failures"] and result["evicted"] > 0
    return result


def _check_case(
    case: KernelCase,
    dtype: str,
    device: str,
    kernels: dict[str, Attention],
    result: dict[str, Any],
) -> None:
    """The reference in float32 runs ahead until a head is full; from there on both take every
    step.
    """
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    policy = case.policy
    numbers = torch.Generator().manual_seed(len(case.name))
    state = GroupState.empty(len(LENGTHS), case.group, case.head_dim, torch.float32, device)
    key, value, scores = (
        _random(numbers, (len(LENGTHS), case.group.num_heads, max(LENGTHS), *size), device)
        for size in ((case.head_dim,), (case.head_dim,), ())
    )
    reference.fill_from_prompt(state, key, value, scores.abs(), lengths)
    ahead = min(case.group.num_slots - max(LENGTHS), 100)
    for step in range(ahead + COMPARED):
        token = [
            _random(numbers, (len(LENGTHS), heads, case.head_dim), device)
            for heads in (case.group.num_heads * case.query_group_size, *[case.group.num_heads] * 2)
        ]
        before = state.copied(torch.float32)
        wanted = reference.decode_attention(*token, state, policy, lengths, lengths + step)
        if step >= ahead:
            typed = [part.to(getattr(torch, dtype)) for part in token]
            for name, attention in kernels.items():
                given = before.copied(getattr(torch, dtype))
                out = attention(*typed, given, policy, lengths, lengths + step)
                what = f"{name}, {case.name}, {dtype}, step {step}"
                _compare(what, dtype, before, (wanted, state), (out, given), result)


def _compare(
    what: str,
    dtype: str,
    before: GroupState,
    wanted: tuple[Tensor, GroupState],
    found: tuple[Tensor, GroupState],
    result: dict[str, Any],
) -> None:
    result["steps"] += 1
    state, ours = wanted[1], found[1]
    result["evicted"] += int(((before.position >= 0) & (state.position != before.position)).sum())
    if not torch.equal(ours.position, state.position):
        if _is_tie(before, state, ours):
            result["ties"] += 1
        else:
            result["failures"].append(f"{what}: another slot or token is held")
        return
    errors = {"out_error": (found[0].float() - wanted[0]).abs().max().item(), "score_error": 0.0}
    if state.score is not None:
        difference = (ours.score - state.score).masked_fill(state.position < 0, 0).abs()
        errors["score_error"] = (difference / state.score.clamp(min=1)).max().item()
    for name, limit in (
        ("out_error", TOLERANCES[dtype].kernel),
        ("score_error", TOLERANCES["float32"].op),
    ):
        result[name][dtype] = max(result[name].get(dtype, 0.0), errors[name])
        if not errors[name] <= limit:
            result["failures"].append(f"{what}: {name} {errors[name]:.3g} above {limit:g}")
    if not (
        torch.equal(ours.key.float(), state.key) and torch.equal(ours.value.float(), state.value)
    ):
        result["failures"].append(f"{what}: another key or value is held")


def _is_tie(before: GroupState, state: GroupState, ours: GroupState) -> bool:
    """Whether the tokens that only one of the two evicted had nearly equal scores."""
    if before.score is None:
        return False
    only_one = (state.position == before.position) != (ours.position == before.position)
    for row, head in only_one.any(dim=2).nonzero().tolist():
        scores = before.score[row, head][only_one[row, head] & (before.position[row, head] >= 0)]
        if len(scores) < 2 or scores.max() - scores.min() > TIE * scores.max():
            return False
    return True


def _random(numbers: torch.Generator, shape: tuple[int, ...], device: str) -> Tensor:
    """Multiples of 1/32 below 4, which float16 and bfloat16 hold exactly."""
    return (torch.randint(-127, 128, shape, generator=numbers) / 32).to(device)


def main() -> None:
    """Runs the measurement that the module describes."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "kernel_check needs a GPU and torch for CUDA: pip install torch for your CUDA"
        )
    cases = (
        tuple(case for case in CASES if case.name in QUICK) if "--quick" in sys.argv[1:] else CASES
    )
    result = check_kernel("cuda", cases)
    print(json.dumps(result))
    raise SystemExit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
