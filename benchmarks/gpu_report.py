"""Checks and measures what only a GPU can show, in three parts of at most eight minutes each.

    python -m benchmarks.gpu_report --out docs/measurements/gpu.json [--part kernel]...

    kernel    the Triton kernel against the reference in every dtype, its image compiled ahead of
              time and launched by the driver, eager and captured, memcheck and racecheck, the
              noise; its time beside other variants, torch's attention and the reading of its caches
    runner    the torch runner with a captured step at the shapes of Janus-Pro-1B and 7B: tokens a
              second and memory, full cache and a fifth, batch 1 to 128, share of the bound
    engines   TensorRT's engines against ONNX Runtime, and their speed

kernel and runner need torch for CUDA, Triton and cuda-bindings, no TensorRT and no network. The
file is written after every task, and a part that is run again replaces its results alone.
Exit codes: 0 done, 1 a check failed, 3 unfinished, with a list of what was not run: on a machine
without a GPU that is all of it, and what the file has of another machine stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_part import UNFINISHED, Result, Task, ended, exit_code, run_part, verdict
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.tensorrt.target import gpu_here

COMMAND = "python -m benchmarks.gpu_report"
PARTS = ("kernel", "runner", "engines")
NO_GPU = "no NVIDIA GPU here, or no driver for it"
ANY_CAPABILITY = 90  # for the names of tasks, which are the same on every GPU
MINUTES = 8.0  # of a part: what is left of ten on a machine that is lent
KERNEL_COLUMNS = [
    "images, slots",
    "kernel ms",
    "best other variant ms",
    "torch's attention ms",
    "reading the caches ms",
    "share of reading",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts asked for and returns the exit code."""
    asked = _asked(arguments)
    capability, parts = gpu_here(), asked.part or PARTS
    results = earlier_results(asked.out)
    if capability is None:
        return without_gpu(parts, asked.out, results)
    for part in parts:
        results[part] = {}
        deadline = time.monotonic() + 60 * asked.minutes
        run_part(
            part_tasks(part, capability),
            results[part],
            deadline,
            lambda: save(asked.out, results),
            say,
        )
    for line in unfinished(results):
        say(f"not run: {line}")
    print(json.dumps(tables(results), indent=1))
    return exit_code({name: r for part in results.values() for name, r in part.items()})


def without_gpu(
    parts: Sequence[str], out: Path | None, results: dict[str, dict[str, Result]]
) -> int:
    """Lists every task of the parts as not run and returns the exit code for that. Results that the
    file has of these parts were measured elsewhere and are kept.
    """
    for part in parts:
        absent = {task.name: {"not_run": NO_GPU} for task in part_tasks(part, ANY_CAPABILITY)}
        for name in absent:
            say(f"not run: {part}: {name} ({NO_GPU})")
        results.setdefault(part, absent)
    save(out, results)
    print(json.dumps(tables(results), indent=1))
    return UNFINISHED


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="printed only without it")
    parser.add_argument("--part", action="append", choices=PARTS, help="all of them without it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of a part")
    return parser.parse_args(arguments)


def part_tasks(part: str, capability: int) -> list[Task]:
    """The tasks of a part; one that says why where the part cannot be loaded here."""

    def load() -> Result:
        tasks.extend(_load(part, capability))
        return {}

    tasks: list[Task] = []
    cannot = ended(load)
    return [Task(part, lambda: cannot, 0)] if cannot else tasks


def _load(part: str, capability: int) -> list[Task]:
    if part == "kernel":
        from benchmarks import gpu_kernel

        return [
            Task("rates", lambda: vars(rates_here()), 10),
            *gpu_kernel.tasks(capability, rates_here),
        ]
    if part == "runner":
        from benchmarks import gpu_runner

        return gpu_runner.tasks(rates_here)
    from benchmarks import gpu_engines

    return gpu_engines.tasks(say)


@lru_cache(maxsize=1)
def rates_here() -> Any:
    """The rates of the GPU, measured once."""
    from benchmarks.gpu_time import measure_rates

    return measure_rates()


def earlier_results(out: Path | None) -> dict[str, dict[str, Result]]:
    """Results of earlier runs in the file, by part."""
    if out is None or not out.exists():
        return {}
    return json.loads(out.read_text())["results"]["parts"]


def save(out: Path | None, results: dict[str, dict[str, Result]]) -> None:
    """Writes the report as it is by now."""
    if out is not None:
        left = unfinished(results)
        report = {"parts": results, "unfinished": left, "tables": tables(results)}
        write_measurement(out, measurement(COMMAND, report))


def unfinished(results: dict[str, dict[str, Result]]) -> list[str]:
    """Tasks that were not run, with the reason; parts that were not asked for, too."""
    lines = [
        f"{part}: {name} ({result['not_run']})"
        for part, of_part in results.items()
        for name, result in of_part.items()
        if "not_run" in result
    ]
    return lines + [f"{part}: not begun" for part in PARTS if part not in results]


def tables(results: dict[str, dict[str, Result]]) -> list[dict[str, Any]]:
    """The checks, then what was timed."""
    made = [checks_table(results)]
    if any("ms" in result for result in results.get("kernel", {}).values()):
        from benchmarks import gpu_kernel

        rows = gpu_kernel.table_rows(results["kernel"])
        made.append(table("Attention of a layer, 16 heads, float16", KERNEL_COLUMNS, rows))
    if any("step" in result for result in results.get("runner", {}).values()):
        from benchmarks import gpu_runner

        rows = gpu_runner.table_rows(results["runner"])
        made.append(table("torch runner, random weights, fp16", gpu_runner.COLUMNS, rows))
    if "engines" in results:
        from benchmarks import gpu_engines

        made += gpu_engines.tables(results["engines"], None)
    return made


def checks_table(results: dict[str, dict[str, Result]]) -> dict[str, Any]:
    """One row for each task that is no plain time, and for each that did not end well."""
    rows = [
        [part, name, verdict(result), _figures(result)]
        for part, of_part in results.items()
        for name, result in of_part.items()
        if verdict(result) != "ok" or not result.keys() & {"ms", "step", "speeds"}
    ]
    return table("Checks on the GPU", ["part", "task", "result", "figures"], rows)


def _figures(result: Result) -> str:
    if "not_run" in result:
        return result["not_run"]
    if result.get("failures"):
        return result["failures"][0]
    if "out_error" in result:
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in result["out_error"].items())
        return (
            f"{result['steps']} steps, {result['evicted']} tokens evicted, greatest errors {errors}"
        )
    if "out_of_memory" in result:
        return f"does not fit: {result['out_of_memory']}"
    if "read_bandwidth" in result:
        return (
            f"reading {result['read_bandwidth'] / 1e9:,.0f} GB/s, copying"
            f" {result['copy_bandwidth'] / 1e9:,.0f} GB/s, float16 products"
            f" {result['matrix_rate'] / 1e12:,.0f} TFLOP/s"
        )
    return result.get("summary", "")


def say(what: str) -> None:
    """Tells on stderr what is being done."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
