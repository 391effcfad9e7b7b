"""Builds all graphs of bundles for every target that TensorRT-RTX takes, with the plugin and
without: seconds and the peak of resident memory. Needs no GPU.

    python -m benchmarks.synthetic_checkpoint --shape janus-pro-1b --dtype fp16 CHECKPOINT
    python cli.py export --model CHECKPOINT --head-map janus-pro-1b --dtype fp16 --out FP16
    python cli.py export --model CHECKPOINT --head-map janus-pro-1b --dtype fp16 --weights int4
    --out INT4 SSD_EXPORT_PLUGIN=LIBRARY python -m benchmarks.target_builds FP16 INT4

Every build has the numbers of its target's recipe and a process to itself; bundles stay as they
are. The table is written after each build, and a build that is in it already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

from benchmarks.engine_builds import weights_of, with_peak
from ssd_export.errors import UserError
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.tensorrt.allocator import return_large_buffers
from ssd_export.tensorrt.build_graph import build_graph
from ssd_export.tensorrt.plan import GRAPHS, BuildSpec, plan_build
from ssd_export.tensorrt.plugin import load_library
from ssd_export.tensorrt.target import read_target, target_names

JSON = Path("docs/measurements/target_builds.json")
COMMAND = "python -m benchmarks.target_builds (its docstring has the steps)"
TITLE = "Building all graphs for every target, without a GPU"
FLAVOR = "tensorrt-rtx"
COLUMNS = ["weights", "plugin", "target", "sm", *GRAPHS, "seconds", "peak MiB", "engines, MB"]


def measure_target(bundle: Path, target: str, plugin: str) -> dict[str, Any]:
    """Builds every engine and throws it away, in this process: run it in one of its own."""
    plan = plan_build(BuildSpec(bundle, target, FLAVOR, plugin))
    if plan.step.library:
        load_library(plan.builder_flavor, plan.step.library)
    return_large_buffers()
    run = {
        "weights": weights_of(plan),
        "plugin": plugin,
        "target": target,
        "capabilities": list(plan.capabilities),
        "batch": str(plan.batch),
        "graphs": {},
    }
    for spec in plan.graphs:
        with tempfile.TemporaryDirectory() as folder:
            began, began_cpu = time.perf_counter(), time.process_time()
            made, peak = with_peak(
                lambda spec=spec, folder=folder: build_graph(
                    plan, spec, Path(folder), lambda *told: None, Event()
                )
            )
        run["graphs"][spec.name] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - began_cpu,
            "peak_bytes": peak,
            "engine_bytes": made.entry.bytes,
            "layers": sum(made.entry.layers.values()),
            "warnings": made.warnings,
        }
    return run


def targets() -> list[str]:
    """The targets that TensorRT-RTX builds for."""
    return [
        name for name in target_names() if name != "cpu" and FLAVOR in read_target(name).flavors
    ]


def rows_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """One row for each build."""
    return [_row(run) for run in runs]


def _row(run: dict[str, Any]) -> list[str]:
    head = [run["weights"], run["plugin"], run["target"]]
    if "failed" in run:
        return [*head, *["-"] * (len(COLUMNS) - 4), run["failed"]]
    graphs = run["graphs"]
    return [
        *head,
        ", ".join(map(str, run["capabilities"])),
        *(f"{graphs[name]['seconds']:.0f}" if name in graphs else "none" for name in GRAPHS),
        f"{sum(graph['seconds'] for graph in graphs.values()):.0f}",
        str(max(graph["peak_bytes"] for graph in graphs.values()) >> 20),
        f"{sum(graph['engine_bytes'] for graph in graphs.values()) / 1e6:.0f}",
    ]


def results_of(runs: list[dict[str, Any]], left: list[tuple[Path, str, str]]) -> dict[str, Any]:
    """The table, and the builds as they were measured. left: those that were not run."""
    absent = [None] * (len(COLUMNS) - 3)
    rows = rows_of(runs) + [[path.name, plugin, target, *absent] for path, target, plugin in left]
    note = (
        "Seconds by graph, then of all; the peak is of the process, over all graphs. The plugin's"
        " kernel releases in the step, so there is no evict graph beside it. Random weights of"
        " Janus-Pro-1B's shape."
    )
    return {"tables": [table(TITLE, COLUMNS, rows, note)], "runs": runs}


def asked_for(bundles: list[Path], runs: list[dict[str, Any]]) -> Iterator[tuple[Path, str, str]]:
    """The builds that are not among the runs."""
    done = {(run["bundle"], run["target"], run["plugin"]) for run in runs}
    for target in targets():
        for bundle in bundles:
            for plugin in ("off", "on"):
                if (bundle.name, target, plugin) not in done:
                    yield bundle, target, plugin


def measured_apart(bundle: Path, target: str, plugin: str) -> dict[str, Any]:
    """The build in a separate process; {"failed": why} where it does not come to an end."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            run = process.submit(measure_target, bundle, target, plugin).result()
        except (UserError, BrokenProcessPool) as error:
            run = {"weights": "?", "target": target, "plugin": plugin, "failed": str(error)}
    return {"bundle": bundle.name} | run


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--limit", type=int, help="builds of this run, the rest are another's")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--note", default="", help="what to know about the circumstances")
    asked = parser.parse_args()
    runs = json.loads(asked.json.read_text())["results"]["runs"] if asked.json.exists() else []
    left = list(asked_for(asked.bundles, runs))
    for done, build in enumerate(left[: asked.limit], start=1):
        runs.append(measured_apart(*build))
        print(" | ".join(_row(runs[-1])), flush=True)
        write_measurement(
            asked.json, measurement(COMMAND, results_of(runs, left[done:]), asked.note)
        )


if __name__ == "__main__":
    main()
