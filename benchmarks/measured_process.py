"""One export or one generation in a separate process: seconds and the peak of resident memory.

    python -m benchmarks.measured_process BUNDLE --tokens 24 [--widen on-use|at-once]
    [--decoder-batch 4]

generates here and prints the figures as JSON: opens the bundle, checks every file, and generates
the first --tokens of one image with ONNX Runtime on the CPU, then decodes the image, however much
of it is there, --decoder-batch times at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = "a red circle above a blue square on white"
WIDEN = {"on-use": True, "at-once": False}
# The command line, and then its peak of resident memory in the file that the first argument names.
COMMAND_LINE = """
import sys
from pathlib import Path
from ssd_export.cli.main import main
from benchmarks.measured_process import peak_bytes
report = Path(sys.argv.pop(1))
try:
    main()
finally:
    report.write_text(str(peak_bytes()))
"""


def run_measured(arguments: Sequence[str]) -> dict[str, float]:
    """Runs the command line in a separate process: {"seconds", "peak_bytes"}. Raises: SystemExit
    where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, began = Path(folder) / "peak", time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND_LINE, str(report), *arguments])
        if done.returncode:
            raise SystemExit(
                f"ssd-export {' '.join(arguments)} failed with exit code {done.returncode}"
            )
        return {"seconds": time.perf_counter() - began, "peak_bytes": int(report.read_text())}


def peak_bytes() -> int:
    """Peak resident bytes of this process since it began; getrusage would count its parent too
    (Linux).
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_export(checkpoint: Path, bundle: Path, options: Sequence[str]) -> dict[str, Any]:
    """An export by the command line, with as many threads as OMP_NUM_THREADS says, and the size of
    what it wrote.
    """
    figures: dict[str, Any] = run_measured(
        ["export", "--model", str(checkpoint), "--out", str(bundle), *options]
    )
    figures["bundle_bytes"] = sum(
        path.stat().st_size for path in bundle.rglob("*") if path.is_file()
    )
    return figures


def process_bytes() -> int:
    """Bytes that a process holds before any model is read: libraries, mostly."""
    plan = answer_of(
        ["plan", "--json", "--model", "janus-pro-1b"], may_fail=True
    )  # where too little is free it fails, and answers
    return plan["host"]["process"]


def answer_of(arguments: Sequence[str], may_fail: bool = False) -> dict[str, Any]:
    """The JSON that the command line prints, run in a separate process. Raises: SystemExit where
    it fails and may not.
    """
    program = "from ssd_export.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode and not may_fail:
        raise SystemExit(
            f"ssd-export {' '.join(arguments)} failed with exit code {done.returncode}"
        )
    return json.loads(done.stdout)


def measure_generation(bundle: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Figures that this module prints for a bundle. Raises: SystemExit where it fails."""
    command = [sys.executable, "-m", "benchmarks.measured_process", str(bundle), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"generating from {bundle} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def generate(
    bundle: Path,
    num_tokens: int | None,
    num_threads: int,
    widen_on_use: bool | None,
    decoder_batch: int,
) -> dict[str, Any]:
    """Generates in this process, whose memory is measured."""
    from ssd_export.bundle import open_bundle
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.loop import decode, single_steps
    from ssd_export.runtime.ort_runner import OrtRunner
    from ssd_export.runtime.prompt_batch import PromptBatches
    from ssd_export.sampling import Sampling

    began = time.perf_counter()
    opened = open_bundle(bundle)
    checked = time.perf_counter()
    runner = OrtRunner(opened, num_threads=num_threads, widen_on_use=widen_on_use)
    with ImageGenerator(opened, runner) as generator:
        num_tokens = num_tokens or generator.config.grid.num_tokens
        batch = PromptBatches.from_bundle(opened)([PROMPT], Sampling(), seed=0)
        loop = decode(runner, batch, generator.table, single_steps(num_tokens))
        next(loop)
        figures = {
            "seconds_to_check": checked - began,
            "seconds_to_first_token": time.perf_counter() - checked,
            "peak_bytes_first_token": peak_bytes(),
            "cache_bytes": runner.cache_bytes(),
            "widened_on_use": runner.widens_on_use,
            "tokens": num_tokens,
            "num_threads": num_threads,
            "decoder_batch": decoder_batch,
        }
        seconds, started = [], time.perf_counter()
        for _ in loop:
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        if seconds:
            figures["seconds_to_second_token"] = seconds[0]  # opens the decode step
            figures["peak_bytes_tokens"] = peak_bytes()
        if seconds[1:]:
            figures["ms_per_token"] = 1000 * statistics.median(seconds[1:])
        started = time.perf_counter()
        runner.decode_image(runner.tokens().repeat(decoder_batch, axis=0))
        figures["seconds_image_decoder"] = time.perf_counter() - started
        return figures | {"peak_bytes": peak_bytes()}


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, help="of the image  [default: all]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--widen",
        choices=sorted(WIDEN),
        help="float16 matrices  [default: by this machine's memory]",
    )
    parser.add_argument("--decoder-batch", type=int, default=1)
    spec = parser.parse_args()
    print(
        json.dumps(
            generate(
                spec.bundle, spec.tokens, spec.threads, WIDEN.get(spec.widen), spec.decoder_batch
            )
        )
    )


if __name__ == "__main__":
    main()
