"""Drives the C++ plugin through every case of the kernel's and through what it has to refuse, and
prints what came out.

A process of its own: TRITON_INTERPRET=1 LD_LIBRARY_PATH=FOLDER python -m tests.plugins.drive_cases
LIBRARY FOLDER, with libcuda.so.1 (the fake) and host.so in the folder. One JSON line for each case
and dtype, then one for each refusal; the plugin's messages go to stderr, below "== NAME".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES
from ssd_export.policy.table import HeadGroup, Rule
from tests.kernels.interpret import ALL_CASES, Comparison, wanted_runs
from tests.plugins.driven_plugin import IMAGE, DrivenPlugin, expected_launch, fields_of

GROUP = HeadGroup(Rule(-1, 2, True), 9, 1, num_heads=2)
NO_BINARY_FOR_GPU, ILLEGAL_ADDRESS = 209, 700


def cases(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """Every case in every dtype, as the interpreter's own test runs them."""
    for name, case in ALL_CASES.items():
        comparison = Comparison(case)
        for wanted, dtype in wanted_runs():
            if wanted == name:
                result = comparison.compare(DTYPES[dtype].torch, driven.attention)
                yield {"case": name, "dtype": dtype, **result, "wrong": driven.launches.wrong}


class Step:
    """One enqueue of a small group, some of it changed."""

    def __init__(self, driven: DrivenPlugin) -> None:
        self.driven, state = driven, GroupState.empty(3, GROUP, 8)
        token = [torch.ones(3, heads, 8) for heads in (4, 2, 2)]
        lengths = [torch.full((3,), 4, dtype=torch.int32), torch.ones(3, dtype=torch.int32)]
        caches = [state.key, state.value, state.position, state.score]
        self.inputs, self.outputs = [*token, *lengths, *caches], [torch.empty(3, 4, 8), *caches]
        self.workspace: Tensor | None = torch.zeros(3 * 2 * 9)
        plugin = driven.attach(fields_of(GROUP, token[0], 1.0, 24))
        assert plugin is not None
        self.plugin = plugin

    def run(self) -> list[int]:
        """Results of onShapeChange and enqueue."""
        self.driven.launches.expected = expected_launch(
            self.inputs, self.outputs, self.workspace, GROUP, 1.0, 24
        )
        shapes = self.driven.set_shapes(self.plugin, self.inputs, self.outputs)
        return [
            shapes,
            self.driven.enqueue(self.plugin, self.inputs, self.outputs, self.workspace),
        ]


def _copied_cache(step: Step) -> None:
    step.outputs[2] = step.outputs[2].clone()


def _misaligned(step: Step) -> None:
    step.inputs[0] = torch.ones(1 + step.inputs[0].numel())[1:].view(step.inputs[0].shape)


def _no_workspace(step: Step) -> None:
    step.workspace = None


def _other_shape(step: Step) -> None:
    step.inputs[1] = torch.ones(3, 1, 8)


REFUSED: dict[str, Callable[[Step], Any]] = {
    "nothing": lambda step: None,
    "a copied cache": _copied_cache,
    "not aligned": _misaligned,
    "no workspace": _no_workspace,
    "another shape": _other_shape,
    "no context": lambda step: step.driven.use_context(0),
    "another GPU": lambda step: step.driven.refuse("cuModuleLoadData", NO_BINARY_FOR_GPU),
    "no such kernel": lambda step: step.driven.refuse("cuModuleGetFunction", 500),
    "a failed launch": lambda step: step.driven.refuse("cuLaunchKernel", ILLEGAL_ADDRESS),
}


def refusals(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """What a step with a fault comes to."""
    for name, fault in REFUSED.items():
        print(f"== {name}", file=sys.stderr, flush=True)
        driven.use_context(100 + len(name))  # one that has no kernel yet
        before = driven.launches.count
        step = Step(driven)
        fault(step)
        results = step.run()
        driven.refuse("")
        driven.destroy(step.plugin)
        yield {"case": name, "results": results, "launches": driven.launches.count - before}


def lifetimes(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """How often images are loaded and unloaded: once a context, until the last plugin is gone."""

    def counts() -> list[int]:
        return [driven.cuda.fake_num_loads(), driven.cuda.fake_num_unloads()]

    before, seen = counts(), []
    for context in (1000, 1000, 1001):
        driven.use_context(context)
        seen.append(Step(driven))
        assert seen[-1].run() == [0, 0]
    loaded = counts()
    for step in seen:
        driven.destroy(step.plugin)
    unloaded = counts()
    yield {
        "case": "lifetimes",
        "loads": loaded[0] - before[0],
        "unloads_before": loaded[1] - before[1],
        "unloads": unloaded[1] - before[1],
        "same_image": set(driven.launches.images) == {IMAGE},
        "wrong": driven.launches.wrong,
    }


def main(library: str, folder: str) -> None:
    """Prints all of it."""
    driven = DrivenPlugin(Path(library), Path(folder))
    for part in (lifetimes, refusals, cases):
        for line in part(driven):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):  # the interpreter computes masked lanes, too
        main(*sys.argv[1:])
