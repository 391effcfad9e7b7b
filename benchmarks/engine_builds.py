"""Builds the decode step of bundles with TensorRT-RTX, no GPU needed: seconds and the peak of
resident memory by phase.

    python -m benchmarks.synthetic_checkpoint --shape janus-pro-1b CHECKPOINT
    python cli.py export --model CHECKPOINT --head-map janus-pro-1b --dtype fp16 --out FP16
    python cli.py export --model CHECKPOINT --head-map janus-pro-1b --dtype fp16 --weights int4
    --out INT4 python -m benchmarks.engine_builds FP16 INT4

Every build runs in a separate process; bundles stay as they are. fp16 is built twice: with its
matrices as inputs, as build-engine does, and with them in the engine. Bounds: int4 under 60 s and 3
GB, fp16 under 120 s and 8.5 GB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from ssd_export.bundle import open_bundle
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.tensorrt.allocator import return_large_buffers
from ssd_export.tensorrt.build_graph import read_graph, serialized_engine, write_engine
from ssd_export.tensorrt.build_memory import needed_bytes
from ssd_export.tensorrt.engine_manifest import EngineEntry
from ssd_export.tensorrt.plan import BuildPlan, BuildSpec, plan_build
from ssd_export.tensorrt.target import Batch

JSON = Path("docs/measurements/build.json")
TITLE = "Building a decode step without a GPU"
COMMAND = "python -m benchmarks.engine_builds (its docstring has the steps)"
GRAPH = "decode_step"
BOUNDS = {"int4": (60.0, 3.0), "float16": (120.0, 8.5)}  # seconds, GB at the peak
PHASES = ("read", "build", "write")
COLUMNS = [
    "weights",
    "matrices are",
    "engine, MB",
    "seconds",
    "of them CPU",
    *(f"peak MiB, {phase}" for phase in PHASES),
    "bound",
]
T = TypeVar("T")


def measure_build(bundle: Path, target: str, batch: str, shared: bool) -> dict[str, Any]:
    """Builds one engine and throws it away, in this process: run it in a separate one."""
    plan = plan_build(BuildSpec(bundle, target, plugin="off", batch=Batch.parse(batch)))
    plan = replace(plan, target=replace(plan.target, shared_weights=shared))
    return_large_buffers()
    began, began_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        peaks, entry = _phases(plan, Path(folder))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return {
        "weights": weights_of(plan),
        "shared": shared,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peaks,
        "engine_bytes": entry.bytes,
        "layers": sum(entry.layers.values()),
        "needed_bytes": needed_bytes(plan.bundle, plan.target, plan.flavor),
    }


def weights_of(plan: BuildPlan) -> str:
    """Storage of the matrices."""
    stored = plan.bundle.config.precision.weights
    return plan.bundle.config.dtype if stored == "none" else stored


def _phases(plan: BuildPlan, scratch: Path) -> tuple[dict[str, int], EngineEntry]:
    """Peak of resident bytes by phase, and the engine's entry."""
    spec = next(graph for graph in plan.graphs if graph.name == GRAPH)
    graph, read = with_peak(lambda: read_graph(plan, spec))
    engine, build = with_peak(
        lambda: serialized_engine(plan, graph, scratch, lambda *told: None, Event())
    )
    made, write = with_peak(lambda: write_engine(plan, graph, engine, scratch))
    return dict(zip(PHASES, (read, build, write), strict=True)), made.entry


def with_peak(work: Callable[[], T]) -> tuple[T, int]:
    """The result of work and the most that was resident meanwhile, everything this process holds
    included.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; see proc(5)
    result = work()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return result, int(lines["VmHWM"].split()[0]) << 10


def results_of(runs: list[dict[str, Any]], target: str, batch: str) -> dict[str, Any]:
    """The table, and the runs as they were measured."""
    rows = [
        [
            run["weights"],
            _place(run),
            f"{run['engine_bytes'] / 1e6:.0f}",
            f"{run['seconds']:.0f}",
            f"{run['cpu_seconds']:.0f}",
            *(f"{run['peak_bytes'][phase] >> 20}" for phase in PHASES),
            _bound(run),
        ]
        for run in runs
    ]
    note = (
        f"TensorRT-RTX, target {target}, batch {batch}, plain operators; random weights of"
        " Janus-Pro-1B's shape."
    )
    return {"tables": [table(TITLE, COLUMNS, rows, note)], "runs": runs}


def _place(run: dict[str, Any]) -> str:
    if not run["shared"]:
        return "constants"
    return (
        "inputs"
        if run["weights"] in ("float32", "float16", "bfloat16")
        else "constants; the others inputs"
    )


def _bound(run: dict[str, Any]) -> str:
    if run["weights"] not in BOUNDS:
        return "none"
    seconds, gigabytes = BOUNDS[run["weights"]]
    holds = run["seconds"] < seconds and max(run["peak_bytes"].values()) < gigabytes * 1e9
    return f"{seconds:.0f} s, {gigabytes} GB: {'holds' if holds else 'missed'}"


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--target", default="ada")
    parser.add_argument("--batch", default="1:1:8", metavar="MIN:OPT:MAX")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--note", default="", help="what to know about the circumstances")
    asked = parser.parse_args()
    runs = []
    for bundle in asked.bundles:
        quantized = open_bundle(bundle).config.precision.weights != "none"
        for shared in (True,) if quantized else (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                runs.append(
                    process.submit(
                        measure_build, bundle, asked.target, asked.batch, shared
                    ).result()
                )
    results = results_of(runs, asked.target, asked.batch)
    for row in [COLUMNS, *results["tables"][0]["rows"]]:
        print(" | ".join(row))
    write_measurement(asked.json, measurement(COMMAND, results, asked.note))


if __name__ == "__main__":
    main()
