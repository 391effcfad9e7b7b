"""Times decode steps with ordinary operators and with those of engines/operators, in turns in one
process, on the CPU.

    python -m benchmarks.step_operators BUNDLE [--batch 1,8,32] [--threads 1] [--steps 575]

Needs the library (engines/README.md). Prints median CPU and wall ms of a step of each, the median
ratio of turns of 23 steps and its range, and how many tokens differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.policy.schedule import eviction_steps
from ssd_export.runtime.ort_operators import HOW_TO_BUILD, find_operators
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling

PROMPT = "a red circle above a blue square"
TURN = 23  # steps of a turn


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


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=575)
    spec = parser.parse_args()
    if find_operators() is None:
        raise SystemExit(f"no library of operators; build it: {HOW_TO_BUILD}")
    bundle = open_bundle(spec.bundle)
    for count in map(int, spec.batch.split(",")):
        print(json.dumps(compare(bundle, count, spec.threads, spec.steps)), flush=True)


if __name__ == "__main__":
    main()
