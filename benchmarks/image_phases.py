"""CPU seconds of one image by phase, on the CPU.

    python -m benchmarks.image_phases BUNDLE... [--threads 1] [--tokens 96] [--before BUNDLE]

Each BUNDLE is measured in a separate process, one after the other: exports of one
model with other --weights, --head-weights or --decoder-weights show what each of them is worth.
With --tokens the steps after the first two are those of fewer tokens, and are multiplied up.
--before BUNDLE is measured first, with ordinary operators instead of those of engines/operators.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "a red circle above a blue square on white"


def phases(
    bundle: Path, num_threads: int, num_tokens: int | None, ordinary: bool = False
) -> dict[str, float]:
    """CPU seconds of all threads, by phase; `image` is their sum. ordinary: without the library of
    operators.
    """
    found: dict[str, float] = {}
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
    mark("image decoder, another image")
    another = found.pop("image decoder, another image")
    found["image"] = sum(found.values())
    return found | {"image decoder, another image": another}


def measured(
    bundle: Path, num_threads: int, num_tokens: int | None, ordinary: bool = False
) -> dict[str, float]:
    """`phases` in a separate process. Raises: SystemExit where it fails."""
    command = [sys.executable, "-m", "benchmarks.image_phases", str(bundle), "--here"]
    command += ["--threads", str(num_threads)]
    command += [] if num_tokens is None else ["--tokens", str(num_tokens)]
    command += ["--ordinary"] * ordinary
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"generating from {bundle} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--before", type=Path, metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="of the image, at least 3  [default: all]")
    for hidden in ("--here", "--ordinary"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    spec = parser.parse_args()
    if spec.tokens is not None and spec.tokens < 3:
        parser.error(f"--tokens {spec.tokens} leaves no steps to time; use 3 or more")
    if spec.here:
        print(json.dumps(phases(spec.bundles[0], spec.threads, spec.tokens, spec.ordinary)))
        return
    runs = {}
    if spec.before is not None:
        name = f"before: {spec.before}"
        runs[name] = measured(spec.before, spec.threads, spec.tokens, ordinary=True)
    runs |= {str(path): measured(path, spec.threads, spec.tokens) for path in spec.bundles}
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
