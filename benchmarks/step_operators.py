"""Times decode steps with ordinary operators and with those of engines/operators, in turns in one
process, on the CPU.

    python -m benchmarks.step_operators [BUNDLE] [--batch 1,8,32] [--threads 1] [--steps 575]
        [--out docs/measurements/step_operators.json]

Without BUNDLE the demo is exported at a fifth of its cache. Needs the library (engines/README.md).
Prints median CPU and wall ms of a step of each, the median ratio of turns of 23 steps and its
range, and how many tokens differ.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.policy.schedule import eviction_steps
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.ort_operators import HOW_TO_BUILD, find_operators
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling

PROMPT = "a red circle above a blue square"
TURN = 23  # steps of a turn
COLUMNS = (
    "images",
    "CPU ms a step, ordinary",
    "with operators",
    "times as fast by CPU time",
    "range",
    "by the clock",
    "tokens that differ",
)


def compare(bundle: Bundle, num_images: int, num_threads: int, num_steps: int) -> dict[str, Any]:
    """Figures of the first steps of a batch."""
    sampling = bundle_sampling(bundle)
    batch = PromptBatches.from_bundle(bundle)([PROMPT] * num_images, sampling, 0)
    evictions = eviction_steps(bundle.config.policy, batch.lengths.tolist())
    runners = [
        OrtRunner(bundle, num_threads=num_threads, uses_operators=uses) for uses in (False, True)
    ]
    if not runners[1].fuses_steps:
        raise SystemExit("this bundle has no steps for these operators; export it again")
    turns: list[list[tuple[float, float]]] = [[], []]
    for runner in runners:
        runner.prefill(batch)
        runner.decode_row(range(1, 2), evictions)  # opens the graph
    for first in range(2, num_steps, TURN):
        steps = range(first, min(first + TURN, num_steps))
        for runner, own in zip(runners, turns, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            runner.decode_row(steps, evictions)
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            own.append((1000 * seconds[0] / len(steps), 1000 * seconds[1] / len(steps)))
    figures: dict[str, Any] = {"images": num_images}
    for place, clock in enumerate(("cpu", "wall")):
        ratios = [plain[place] / fused[place] for plain, fused in zip(*turns, strict=True)]
        figures |= {
            f"{clock}_ms": [statistics.median(one[place] for one in own) for own in turns],
            f"{clock}_times_as_fast": statistics.median(ratios),
            f"{clock}_range": [min(ratios), max(ratios)],
        }
    differ = np.count_nonzero(runners[0].tokens() != runners[1].tokens())
    return figures | {"different_tokens": int(differ)}


def results_of(measured: list[dict[str, Any]], num_threads: int) -> dict[str, Any]:
    """Table and figures of a measurement, a row for each number of images."""
    rows = [
        [
            one["images"],
            *(f"{ms:.2f}" for ms in one["cpu_ms"]),
            f"{one['cpu_times_as_fast']:.2f}",
            "{:.2f} to {:.2f}".format(*one["cpu_range"]),
            f"{one['wall_times_as_fast']:.2f}",
            one["different_tokens"],
        ]
        for one in measured
    ]
    note = (
        f"{num_threads} thread; medians of turns of {TURN} steps, everything between steps counted."
    )
    return {
        "tables": [table("A decode step with operators of engines/operators", COLUMNS, rows, note)],
        "figures": {
            f"{one['images']}-times_as_fast": f"{one['cpu_times_as_fast']:.1f}" for one in measured
        },
    }


@contextmanager
def opened(path: Path | None) -> Iterator[Bundle]:
    """The bundle, or the demo's at a fifth of its cache."""
    if path is not None:
        yield open_bundle(path)
    else:
        with temporary_bundle(PolicyChoice()) as demo:
            yield open_bundle(demo)


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=575)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    spec = parser.parse_args()
    if find_operators() is None:
        raise SystemExit(f"no library of operators; build it: {HOW_TO_BUILD}")
    measured = []
    with opened(spec.bundle) as bundle:
        for count in map(int, spec.batch.split(",")):
            measured.append(compare(bundle, count, spec.threads, spec.steps))
            print(json.dumps(measured[-1]), flush=True)
    if spec.out is not None:
        command = shlex.join(["python", "-m", "benchmarks.step_operators", *sys.argv[1:]])
        write_measurement(spec.out, measurement(command, results_of(measured, spec.threads)))


if __name__ == "__main__":
    main()
