"""Drives the C++ plugin through every case of the kernel's and through what it has to refuse, and
prints what came out.

LD_LIBRARY_PATH=FOLDER python -m tests.kernels.interpreted -m tests.plugins.drive_cases LIBRARY
FOLDER, with libcuda.so.1 (the fake) and host.so in the folder. One JSON line for each case and
dtype, then one for each refusal; the plugin's messages go to stderr, below "== NAME".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.dtypes import DTYPES
from ssd_export.export.plugin_flavor import SETTLE, WINDOW
from ssd_export.kernels.compile import kernel_arguments
from ssd_export.kernels.image import LAYER as LAYER_KERNEL
from ssd_export.kernels.image import NODE_KERNELS, STEP_KERNELS
from ssd_export.policy.table import GroupPolicy, HeadGroup, Rule
from tests.kernels.interpret import ALL_CASES, Comparison, ThreeGroups, small_blocks, wanted_runs
from tests.kernels.interpret_window import LAYER as THREE_GROUPS
from tests.kernels.interpret_window import of_case, of_layer, wanted_windows
from tests.plugins.driven_plugin import (
    IMAGES,
    DrivenPlugin,
    DrivenWindow,
    Expected,
    expected_launches,
    fields_of,
)

POLICY = GroupPolicy(HeadGroup(Rule(-1, 2, True), 9, 1, num_heads=2), 1.0, 24)
NO_BINARY_FOR_GPU, ILLEGAL_ADDRESS = 209, 700
MOST_MULTIPROCESSORS = 256  # that the plugin counts
PARTS = 3
LAYER, IN_PARTS = "a layer", "a layer in parts"
IN_PARTS_EVERY = 4  # cases: the split itself is compared on all of them in tests/kernels
A_WINDOW, WINDOWS_EVERY = "a window", 4


def driven_runs() -> list[tuple[str, str, str]]:
    """(form, case, dtype) of every line of the cases."""
    runs = [(LAYER, *run) for run in wanted_runs()]
    float32 = [run for run in wanted_runs() if run[1] == "float32"]
    return runs + [(IN_PARTS, *run) for run in float32[::IN_PARTS_EVERY]]


def driven_windows() -> list[tuple[str, str]]:
    """(case, dtype) of the windows: what they compute is compared on all of them in tests/kernels,
    so that here are enough for every form of a layer.
    """
    return wanted_windows()[::-WINDOWS_EVERY]


def cases(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """Every case in every dtype, as the interpreter's own test runs them."""
    for name, case in ALL_CASES.items():
        comparison = Comparison(case)
        for form, wanted, dtype in driven_runs():
            if wanted != name:
                continue
            in_parts = form == IN_PARTS
            programs = case.rows * case.num_heads
            attend = partial(driven.attention, -(-PARTS * programs // 2) if in_parts else 1)
            with small_blocks(case.num_slots) if in_parts else nullcontext():
                result = comparison.compare(DTYPES[dtype].torch, attend, dtype != "float32")
            yield {
                "form": form,
                "case": name,
                "dtype": dtype,
                **result,
                "wrong": driven.launches.wrong,
            }


def layers(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """A layer of three groups, in one launch and in parts."""
    for form, multiprocessors in ((LAYER, 1), (IN_PARTS, 18)):
        before = len(driven.launches.kernels)
        with small_blocks(ThreeGroups.MOST_SLOTS):
            attend = partial(driven.layer, num_multiprocessors=multiprocessors)
            result = ThreeGroups().compare(form, attend)
        kernels = sorted(set(driven.launches.kernels[before:]))
        yield {**result, "kernels": kernels, "wrong": driven.launches.wrong}


def windows(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """A window of a layer of three groups, and of every case whose dtype is driven."""
    for name, dtype in driven_windows():
        window = of_layer() if name == THREE_GROUPS else of_case(name)
        with small_blocks(max(state.position.shape[2] for state in window.states)):
            result = window.compare(DTYPES[dtype].torch, driven.window)
        yield {
            "form": A_WINDOW,
            "case": name,
            "dtype": dtype,
            **result,
            "wrong": driven.launches.wrong,
        }


class Step:
    """One enqueue of a small layer, some of it changed."""

    def __init__(self, driven: DrivenPlugin) -> None:
        self.driven, self.state = driven, GroupState.empty(3, POLICY.group, 8)
        state = self.state
        lengths = [torch.full((3,), 4, dtype=torch.int32), torch.ones(3, dtype=torch.int32)]
        caches = [state.key, state.value, state.position, state.score]
        self.inputs = [torch.ones(3, 8, 8), *lengths, *caches]
        self.outputs = [torch.empty(3, 4, 8), *caches]
        plugin = driven.attach(fields_of([POLICY], self.outputs[0]))
        assert plugin is not None
        self.plugin = plugin
        self.workspace: Tensor | None = driven.workspace(plugin, self.inputs, self.outputs)

    def run(self, change: Callable[[Expected], None] = lambda expected: None) -> list[int]:
        """Results of onShapeChange and enqueue. change: of what the launch is compared with."""
        self.driven.launches.expected = expected = expected_launches(
            self.inputs, self.outputs, self.workspace, [self.state], [POLICY]
        )
        change(expected)
        shapes = self.driven.set_shapes(self.plugin, self.inputs, self.outputs)
        return [
            shapes,
            self.driven.enqueue(self.plugin, self.inputs, self.outputs, self.workspace),
        ]

    def run_rows(self, rows: int, most: int, num_multiprocessors: int) -> int:
        """An enqueue of so many rows in the workspace of the most rows; the parts of a head."""
        inputs, outputs = (
            [one[:1].repeat(most, *[1] * (one.dim() - 1)) for one in side]
            for side in (self.inputs, self.outputs)
        )
        outputs[1:] = inputs[3:]
        workspace = self.driven.workspace(self.plugin, inputs, outputs)
        inputs, outputs = [one[:rows] for one in inputs], [one[:rows] for one in outputs]
        self.driven.launches.expected = expected = expected_launches(
            inputs, outputs, workspace, [GroupState(*inputs[3:])], [POLICY], num_multiprocessors
        )
        self.driven.set_shapes(self.plugin, inputs, outputs)
        self.driven.enqueue(self.plugin, inputs, outputs, workspace)
        return expected.num_splits


def _copied_cache(step: Step) -> None:
    step.outputs[2] = step.outputs[2].clone()


def _misaligned(step: Step) -> None:
    like = step.inputs[4]
    moved = torch.ones(1 + like.numel(), dtype=like.dtype)[1:].view(like.shape)
    step.inputs[4] = step.outputs[2] = moved


def _no_workspace(step: Step) -> None:
    step.workspace = None


def _other_shape(step: Step) -> None:
    step.inputs[3] = torch.ones(3, 2, 9, 7)


REFUSED: dict[str, Callable[[Step], Any]] = {
    "nothing": lambda step: None,
    "a copied cache": _copied_cache,
    "not aligned": _misaligned,
    "no workspace": _no_workspace,
    "another shape": _other_shape,
    "no context": lambda step: step.driven.use_context(0),
    "no such device": lambda step: step.driven.refuse("cuDeviceGetAttribute", 101),
    "another GPU": lambda step: step.driven.refuse("cuModuleLoadData", NO_BINARY_FOR_GPU),
    "no such kernel": lambda step: step.driven.refuse("cuModuleGetFunction", 500),
    "a failed launch": lambda step: step.driven.refuse("cuLaunchKernel", ILLEGAL_ADDRESS),
}


def refusals(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """What a step with a fault comes to."""
    for name, fault in REFUSED.items():
        print(f"== {name}", file=sys.stderr, flush=True)
        driven.use_context(100 + len(name))  # one that has no kernel yet
        before = len(driven.launches.kernels)
        step = Step(driven)
        fault(step)
        results = step.run()
        driven.refuse("")
        driven.destroy(step.plugin)
        yield {"case": name, "results": results, "launches": driven.launches.kernels[before:]}


def _other(value: Any) -> Any:
    """Another argument of the kind; of a tuple, its first one."""
    if isinstance(value, tuple):
        return (_other(value[0]), *value[1:])
    return torch.empty(1) if value is None or isinstance(value, Tensor) else value + 1


def _with_another(side: str, name: str) -> Callable[[Expected], None]:
    def change(expected: Expected) -> None:
        values = getattr(expected, side)
        values[name] = _other(values[name])

    return change


def mismatches(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """What the comparison says of a launch that differs from the one expected in one argument."""
    step, wrong = Step(driven), driven.launches.wrong
    assert step.run() == [0, 0] and not wrong
    expected = driven.launches.expected
    assert expected is not None
    parameters = {argument["name"].partition("[")[0] for argument in kernel_arguments(LAYER_KERNEL)}
    for side in ("tensors", "numbers"):
        for name in sorted(getattr(expected, side).keys() & parameters):
            results = step.run(_with_another(side, name))
            yield {"case": f"another {name}", "results": results, "wrong": list(wrong)}
            wrong.clear()
    grid = step.run(lambda expected: setattr(expected, "programs", expected.programs + 1))
    yield {"case": "another grid", "results": grid, "wrong": list(wrong)}
    wrong.clear()
    driven.destroy(step.plugin)


def window_mismatches(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """The same of the two nodes of a window."""
    window, wrong = of_layer(), driven.launches.wrong
    window.compare(torch.float32, driven.window)
    assert not wrong
    driven.launches.interprets = False
    made = DrivenWindow(*window.token, window.states, window.policies)
    made.of_rows(position=window.position, prompt_length=window.prompt_length)
    made.of_rows(active=window.active, counts=window.active)
    for kind in (WINDOW, SETTLE):
        parameters = {
            argument["name"].partition("[")[0]
            for kernel in NODE_KERNELS[kind.op_type]
            for argument in kernel_arguments(kernel)
        }
        whole = made.expected()
        changes = {
            f"another {name}": _with_another(side, name)
            for side in ("tensors", "numbers")
            for name in sorted(getattr(whole, side).keys() & parameters)
        }
        changes["another grid"] = lambda one: setattr(one, "programs", one.programs + 1)
        if kind is WINDOW:
            changes["another number of queries"] = lambda one: setattr(one, "queries", 1)
        plugin = driven.attach(fields_of(made.policies, made.query, kind), kind)
        assert plugin is not None
        inputs, outputs = made.inputs(kind), made.outputs(kind)
        for case, change in changes.items():
            driven.launches.expected = expected = made.expected()
            change(expected)
            result = driven.enqueue(plugin, inputs, outputs, None)
            yield {"form": kind.op_type, "case": case, "results": [result], "wrong": list(wrong)}
            wrong.clear()
        driven.destroy(plugin)
    driven.launches.interprets = True


def lifetimes(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """How often images are loaded and unloaded: once a context, until the last plugin is gone."""

    def counts() -> list[int]:
        return [driven.cuda.fake_num_loads(), driven.cuda.fake_num_unloads()]

    before, seen = counts(), []
    for context in (1000, 1000, 1001):
        driven.use_context(context)
        seen.append(Step(driven))
        assert seen[-1].run() == [0, 0], driven.launches.wrong
    loaded = counts()
    for step in seen:
        driven.destroy(step.plugin)
    unloaded = counts()
    yield {
        "case": "lifetimes",
        "loads": loaded[0] - before[0],
        "unloads_before": loaded[1] - before[1],
        "unloads": unloaded[1] - before[1],
        "same_images": set(driven.launches.images) == {IMAGES[name] for name in STEP_KERNELS},
        "wrong": driven.launches.wrong,
    }


def workspaces(driven: DrivenPlugin) -> Iterator[dict[str, object]]:
    """Whether what is asked for at the most rows holds the arrays of fewer, on any GPU."""
    driven.launches.interprets = False
    for number, multiprocessors in enumerate((1, 2, 7, 60, 256, 4000)):
        driven.use_context(2000 + number)
        driven.use_multiprocessors(multiprocessors)
        with small_blocks(POLICY.group.num_slots):
            step = Step(driven)
            for rows in (1, 3, 31, 120):
                wrong = len(driven.launches.wrong)
                splits = step.run_rows(rows, 120, min(multiprocessors, MOST_MULTIPROCESSORS))
                case = f"{multiprocessors} multiprocessors, {rows} rows"
                found = driven.launches.wrong[wrong:]
                yield {"case": case, "splits": splits, "wrong": found}
        driven.destroy(step.plugin)
    driven.launches.interprets = True


def main(library: str, folder: str) -> None:
    """Prints all of it."""
    driven = DrivenPlugin(Path(library), Path(folder))
    parts = (lifetimes, refusals, mismatches, window_mismatches, workspaces, layers, windows, cases)
    for part in parts:
        for line in part(driven):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
