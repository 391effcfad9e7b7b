"""Runs the kernels of a window through Triton's interpreter beside the torch reference and prints
how far they are apart.

python -m tests.kernels.interpreted -m tests.kernels.interpret_window CASE... One JSON line for
each case and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_export.cache import window_attention as reference
from ssd_export.cache.attention import decode_attention, decode_layer
from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES
from ssd_export.kernels import window_attention as kernel
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from tests.kernels.interpret import ALL_CASES, Comparison, ThreeGroups, small_blocks

MOST_PLACES = 5
OTHER_DTYPE_EVERY = 8  # cases: they share every line of the integer work
LAYER = "three groups"


def wanted_windows() -> list[tuple[str, str]]:
    """(case, dtype) of every line."""
    some = list(ALL_CASES)[::OTHER_DTYPE_EVERY]
    runs = [(name, "float32") for name in ALL_CASES]
    runs += [(name, dtype) for name in some for dtype in ("float16", "bfloat16")]
    return [*runs, (LAYER, "float32")]


class Window:
    """A window of a layer: attended, then some of its tokens written, by both; rows accept
    different numbers of tokens, and the last row rests.
    """

    def __init__(
        self,
        token: Sequence[Tensor],
        states: Sequence[GroupState],
        policies: Sequence[GroupPolicy],
        prompt_length: Tensor,
        position: Tensor,
    ) -> None:
        self.token, self.states, self.policies = token, states, policies
        self.prompt_length, self.position = prompt_length, position
        rows = len(position)
        self.active = torch.arange(rows) < max(1, rows - 1)

    def counts(self, states: Sequence[GroupState]) -> Tensor:
        """Tokens of each row that are accepted, of a window that is attended."""
        room = torch.stack([(state.position < 0).sum(-1).amin(-1) for state in states]).amin(0)
        places = self.token[0].shape[2]  # some of which are rejected
        accepted = torch.clamp(places - 1 - torch.arange(len(room)), min=1)
        return torch.minimum(room, accepted) * self.active

    def compare(
        self, dtype: torch.dtype, attend: Callable[..., Any] = kernel.attend_layer_window
    ) -> dict[str, object]:
        """What differs. attend: as the kernels' attend_layer_window."""
        given = [state.copied(dtype) for state in self.states]
        token = [part.to(dtype) for part in self.token]
        place = self.prompt_length, self.position, self.active
        before = [state.position.clone() for state in self.states]
        out, write = attend(*token, given, self.policies, *place)
        wanted, write_wanted = reference.attend_layer_window(
            *self.token, self.states, self.policies, *place
        )
        evicted = sum(
            not torch.equal(state.position, old)
            for state, old in zip(self.states, before, strict=True)
        )
        counts = self.counts(self.states)
        write(counts)
        write_wanted(counts)
        errors = [0.0]
        equal = True
        for ours, theirs in zip(given, self.states, strict=True):
            equal &= torch.equal(ours.position, theirs.position)
            equal &= torch.equal(ours.key.float(), theirs.key)
            equal &= torch.equal(ours.value.float(), theirs.value)
            if theirs.score is not None:
                error = (ours.score - theirs.score).masked_fill(theirs.position < 0, 0).abs()
                errors.append((error / theirs.score.clamp(1)).max().item())
        return {
            "slots_equal": equal,
            "out_error": (out.float() - wanted)[self.active].abs().max().item(),
            "score_error": max(errors),
            "accepted": sorted({int(count) for count in counts}),
            "places": token[0].shape[2],
            "evicted": evicted,
        }


def of_case(name: str) -> Window:
    """A window that begins where heads are full, where any of the case ever are."""
    comparison = Comparison(ALL_CASES[name])
    case, data, state = comparison.case, comparison.data, comparison.state
    first = comparison.step
    if first < case.steps - 1:
        comparison.run(first, state, decode_attention)
        first += 1
    steps = slice(first, min(first + MOST_PLACES, case.steps))
    token = [torch.stack(list(part[steps]), dim=2) for part in (data.query, data.key, data.value)]
    lengths = data.prompt_length
    return Window(token, [state], [case.policy], lengths, lengths + first)


class ThreeWideGroups(ThreeGroups):
    """As the layer of single steps, but that a window fits after every eviction."""

    GROUPS = (HeadGroup(Rule(-1, 0, False), 13, 4, 1), *ThreeGroups.GROUPS[1:])
    ROWS, LENGTHS = 3, (4, 4, 3)


def of_layer(num_steps: int = 13) -> Window:
    """A window of a layer of three groups, of which the first is full."""
    layer = ThreeWideGroups()
    for step in range(num_steps):
        decode_layer(
            *layer.token(), layer.states, layer.policies, layer.lengths, layer.lengths + step
        )
    tokens = [layer.token() for _ in range(4)]
    window = [torch.stack(parts, dim=2) for parts in zip(*tokens, strict=True)]
    first = layer.lengths + num_steps
    return Window(window, layer.states, layer.policies, layer.lengths, first)


def results(names: Sequence[str]) -> Iterator[dict[str, object]]:
    for name, dtype in wanted_windows():
        if name in names:
            window = of_layer() if name == LAYER else of_case(name)
            slots = max(state.position.shape[2] for state in window.states)
            with small_blocks(slots):
                result = window.compare(DTYPES[dtype].torch)
            yield {"case": name, "dtype": dtype, **result}


if __name__ == "__main__":
    for line in results(sys.argv[1:] or [*ALL_CASES, LAYER]):
        print(json.dumps(line), flush=True)
