"""CPU seconds of one image by phase, with ordinary operators and with those of engines/operators.

    python -m benchmarks.image_phases BUNDLE... [--threads 1] [--tokens 96] [--rounds 3]
        [--out docs/measurements/image_phases.json]

Every round measures each BUNDLE in two separate processes, one after the other; prints medians of
the rounds as JSON. Exports of one model with other --weights, --head-weights or --decoder-weights
show what each of them is worth; `python -m benchmarks.synthetic_checkpoint` writes random weights
of a published shape. With --tokens the steps after the first two are those of fewer tokens, and are
multiplied up. What needs the library of operators is left out where it is not built.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measured_process import peak_bytes
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.ort_operators import find_operators

PROMPT = "a red circle above a blue square on white"
ORDINARY, WITH_OPERATORS = "ordinary operators", "with the library"
ANOTHER, PEAK = "image decoder, another image", "peak bytes"
Phases = dict[str, float]


def phases(
    bundle: Path, num_threads: int, num_tokens: int | None, ordinary: bool = False
) -> Phases:
    """CPU seconds of all threads, by phase; `image` is their sum. Beside them the decoder's seconds
    of a second image, and the peak of resident bytes. ordinary: without the library of operators.
    """
    found: Phases = {}
    began = time.process_time()

    def mark(phase: str) -> None:
        nonlocal began
        now = time.process_time()
        found[phase], began = now - began, now

    from ssd_export.bundle import open_bundle
    from ssd_export.runtime.loop import decode, single_steps
    from ssd_export.runtime.ort_runner import OrtRunner
    from ssd_export.runtime.prompt_batch import PromptBatches
    from ssd_export.sampling import Sampling

    mark("imports")
    opened = open_bundle(bundle)
    mark("files checked")
    uses_operators = False if ordinary else None
    runner = OrtRunner(opened, num_threads=num_threads, uses_operators=uses_operators)
    mark("prefill opened")
    whole = opened.config.model.grid.num_tokens
    count = whole if num_tokens is None else min(num_tokens, whole)
    batch = PromptBatches.from_bundle(opened)([PROMPT], Sampling(), seed=0)
    loop = decode(runner, batch, opened.config.policy, single_steps(count))
    next(loop)
    mark("prefill")
    next(loop)
    mark("decode step opened, first step")
    for _ in loop:
        pass
    mark("steps")
    found["steps"] *= (whole - 2) / (count - 2)
    runner.decode_image(runner.tokens())
    mark("image decoder opened, first image")
    runner.decode_image(runner.tokens())
    mark(ANOTHER)
    another = found.pop(ANOTHER)
    found["image"] = sum(found.values())
    return found | {ANOTHER: another, PEAK: peak_bytes()}


def measured(
    bundle: Path, num_threads: int, num_tokens: int | None, ordinary: bool = False
) -> Phases:
    """`phases` in a separate process. Raises: SystemExit where it fails."""
    command = [sys.executable, "-m", "benchmarks.image_phases", str(bundle), "--here"]
    command += ["--threads", str(num_threads)]
    command += [] if num_tokens is None else ["--tokens", str(num_tokens)]
    command += ["--ordinary"] * ordinary
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"generating from {bundle} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def compare(
    bundles: Mapping[str, Path], num_threads: int, num_tokens: int | None, rounds: int
) -> dict[str, Phases]:
    """Medians of the rounds, by bundle and operators; every round measures all of them in turn."""
    kinds = [ORDINARY] + [WITH_OPERATORS] * (find_operators() is not None)
    turns: dict[str, list[Phases]] = {}
    for _ in range(rounds):
        for name, path in bundles.items():
            for kind in kinds:
                found = measured(path, num_threads, num_tokens, kind == ORDINARY)
                turns.setdefault(f"{name}, {kind}", []).append(found)
    return {
        name: {phase: statistics.median(turn[phase] for turn in own) for phase in own[0]}
        for name, own in turns.items()
    }


def results_of(found: Mapping[str, Phases], note: str) -> dict[str, Any]:
    """Table and figures of a measurement: a row for each phase, a column for each bundle."""
    first = next(iter(found.values()))
    rows = [
        [phase, *(f"{own[phase]:.1f}" for own in found.values())]
        for phase in first
        if phase != PEAK
    ]
    rows.append(
        ["peak of resident memory, GB", *(f"{own[PEAK] / 1e9:.2f}" for own in found.values())]
    )
    figures = {}
    for name, own in found.items():
        key = name.replace(", ", "-").replace(" ", "_")
        figures |= {
            f"{key}-image": f"{own['image']:.0f}",
            f"{key}-gb": f"{own[PEAK] / 1e9:.1f}",
            f"{key}-times_as_fast": f"{first['image'] / own['image']:.1f}",
        }
    title = "CPU seconds of one image by phase"
    return {"tables": [table(title, ("phase", *found), rows, note)], "figures": figures}


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="of the image, at least 3  [default: all]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    for hidden in ("--here", "--ordinary"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    spec = parser.parse_args()
    if spec.tokens is not None and spec.tokens < 3:
        parser.error(f"--tokens {spec.tokens} leaves no steps to time; use 3 or more")
    if spec.here:
        print(json.dumps(phases(spec.bundles[0], spec.threads, spec.tokens, spec.ordinary)))
        return
    bundles = {path.name: path for path in spec.bundles}
    if len(bundles) < len(spec.bundles):
        parser.error("two bundles have the same name; the table tells them apart by it")
    found = compare(bundles, spec.threads, spec.tokens, spec.rounds)
    print(json.dumps(found, indent=1))
    if spec.out is not None:
        of = "all steps" if spec.tokens is None else f"steps of {spec.tokens} tokens multiplied up"
        note = f"{spec.threads} thread(s), {of}; medians of {spec.rounds} rounds in turns."
        command = shlex.join(["python", "-m", "benchmarks.image_phases", *sys.argv[1:]])
        write_measurement(spec.out, measurement(command, results_of(found, note)))


if __name__ == "__main__":
    main()
