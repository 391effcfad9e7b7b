"""Checks and measures in a few minutes what only a GPU can show, and writes it as a measurement.

    python -m benchmarks.gpu_report --out docs/measurements/gpu.json

    kernel     the Triton kernel against the torch reference, and under compute-sanitizer where that
    is installed tokens     engines with the plugin and of plain operators against ONNX Runtime:
    caches, logits, 576 tokens, pixels speed      full cache and budget 0.2, same runtime, batch 1
    to 128, beside the bound of the GPU's measured rates
A part that cannot be run here says why and leaves the others alone; a check that fails makes the
exit code 1. Without a GPU nothing is run or written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_speed import Speed, graph_text, measure_speed, speed_table
from ssd_export.errors import UserError
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.tensorrt.target import Batch, gpu_here

COMMAND = "python -m benchmarks.gpu_report"
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_PLACES = (
    Path("/usr/local/cuda/bin/compute-sanitizer"),
    Path("/usr/local/cuda/compute-sanitizer/compute-sanitizer"),
)
KERNEL_CHECK = [sys.executable, "-m", "benchmarks.kernel_check"]
TOKENS_BATCH = Batch(1, 2, 4)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Where to write.  [default: printed only]",
)
@click.option(
    "--shape",
    default="janus-pro-1b",
    show_default=True,
    metavar="NAME",
    help="Of the random checkpoint that speed is measured with.",
)
@click.option(
    "--batches",
    default="1,8,32,128",
    show_default=True,
    metavar="N,N,...",
    help="Images generated at once.",
)
def main(out: Path | None, shape: str, batches: str) -> None:
    """Runs the measurement that the module describes."""
    try:
        if gpu_here() is None:
            raise UserError("no NVIDIA GPU here, or no driver for it: nothing was run")
        measured = report(shape, tuple(int(batch) for batch in batches.split(",")))
        if out is not None:
            write_measurement(out, measured)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
    click.echo(json.dumps(measured["results"]["tables"], indent=1))
    raise SystemExit(0 if measured["results"]["ok"] else 1)


def report(shape: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """All parts, one after the other, each in its own right."""
    results: dict[str, Any] = {"kernel": attempt("kernel", check_kernel_here)}
    for tool in SANITIZERS:
        results[tool] = attempt(tool, lambda tool=tool: sanitize(tool))
    for plugin in ("on", "off"):
        results[f"tokens_plugin_{plugin}"] = attempt(
            f"tokens, plugin {plugin}", lambda plugin=plugin: check_tokens(plugin)
        )
    results["rates"] = attempt("rates", rates_here)
    rates = None if "not_run" in results["rates"] else results["rates"]
    speeds: list[Speed] = []
    results["speed"] = attempt("speed", lambda: collect_speeds(shape, batches, speeds))
    results["speed"]["measured"] = [vars(speed) for speed in speeds]
    results["ok"] = all(part.get("ok", True) for part in results.values() if isinstance(part, dict))
    results["tables"] = [checks_table(results), speed_table(shape, speeds, rates)]
    results["figures"] = {
        f"tokens_per_second_{speed.policy.replace(' ', '_')}_{speed.batch}": (
            f"{speed.tokens_per_second:,.0f}"
        )
        for speed in speeds
    }
    return measurement(COMMAND, results)


def attempt(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The part's result, {"not_run": why} for what this machine lacks, or a failure where it
    broke.
    """
    say(name)
    try:
        return part()
    except (UserError, ImportError) as error:
        say(f"{name}: not run ({error})")
        return {"not_run": str(error)}
    except (
        RuntimeError,
        ValueError,
        AssertionError,
    ) as error:  # the other parts are worth their time all the same
        say(f"{name}: FAILED ({error})")
        return {"ok": False, "failures": [f"{type(error).__name__}: {error}"]}


def collect_speeds(shape: str, batches: tuple[int, ...], speeds: list[Speed]) -> dict[str, Any]:
    """Adds to speeds as they come, so that an end in the middle keeps what was measured."""
    speeds.extend(measure_speed(shape, batches, say))
    return {}


def say(what: str) -> None:
    """Tells on stderr what is being done."""
    click.echo(what, err=True)


def check_kernel_here() -> dict[str, Any]:
    """Runs the kernel's check in a separate process, so that a fault of the kernel ends that
    process.
    """
    run = subprocess.run(KERNEL_CHECK, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    if not lines:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        if "needs" in reason or "No module named" in reason:
            raise UserError(reason)
        return {"ok": False, "failures": [f"ended with {run.returncode}: {reason}"]}
    return json.loads(lines[-1])


def sanitize(tool: str) -> dict[str, Any]:
    """The quick kernel check under a tool of compute-sanitizer. Raises: UserError where it is not
    installed.
    """
    found = shutil.which("compute-sanitizer") or next(
        (str(place) for place in SANITIZER_PLACES if place.exists()), None
    )
    if found is None:
        raise UserError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [found, "--tool", tool, "--error-exitcode", "99", *KERNEL_CHECK, "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line] or [
        f"ended with {run.returncode}"
    ]
    return {"ok": run.returncode == 0, "summary": summary[-1].strip("= ")}


def check_tokens(plugin: str) -> dict[str, Any]:
    """The demo bundle's engines, built here, on verify's ladder against ONNX Runtime; an image's
    CUDA graphs.
    """
    from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.tensorrt.build import build_engines
    from ssd_export.tensorrt.plan import BuildSpec, plan_build
    from ssd_export.verify.spec import VerifySpec
    from ssd_export.verify.verify import verify

    with temporary_bundle(PolicyChoice()) as path:
        build_engines(plan_build(BuildSpec(bundle=path, plugin=plugin, batch=TOKENS_BATCH)))
        ladder = verify(VerifySpec(path, against="trt"))
        prompts = ["a red circle on white", "a blue square above a green triangle"]
        with ImageGenerator.from_bundle(path, runner="trt") as generator:
            tokens = generator(prompts, seed=1).tokens
            graphs = generator.runner.graph_nodes()
        with ImageGenerator.from_bundle(path) as generator:
            same = float((generator(prompts, seed=1).tokens == tokens).mean())
    failed = [
        f"{rung['name']}: {rung['first_divergence']['text']}"
        for rung in ladder["rungs"]
        if not rung["ok"]
    ]
    return {
        "ok": ladder["ok"],
        "failures": failed,
        "same_tokens": same,
        "graphs": graph_text(graphs),
        "rungs": ladder["rungs"],
    }


def rates_here() -> dict[str, Any]:
    """Bandwidth and matrix rate, by torch. Raises: UserError without torch for CUDA."""
    from ssd_export.bench.roofline import measure_cuda

    try:
        return measure_cuda("float16").to_dict()
    except (ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"bandwidth and matrix rate are measured with torch for CUDA ({error})"
        ) from error


def checks_table(results: dict[str, Any]) -> dict[str, Any]:
    """One row for each check: what was compared, and how it ended."""
    names = {
        "kernel": "Triton kernel = torch reference, float32, float16, bfloat16",
        "memcheck": "kernel under compute-sanitizer memcheck",
        "racecheck": "kernel under compute-sanitizer racecheck",
        "tokens_plugin_on": "plugin engine = ONNX Runtime over 576 steps",
        "tokens_plugin_off": "engine of plain operators = ONNX Runtime over 576 steps",
    }
    rows = [
        [text, _verdict(results[name]), _figures(results[name])] for name, text in names.items()
    ]
    return table("Checks on the GPU", ["check", "result", "figures"], rows)


def _verdict(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return "not run"
    return "ok" if result["ok"] else "FAILED"


def _figures(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return result["not_run"]
    if result.get("failures"):
        return result["failures"][0]
    if "out_error" in result:
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in result["out_error"].items())
        return (
            f"{result['steps']} steps, {result['evicted']} tokens evicted, greatest errors {errors}"
        )
    if "same_tokens" in result:
        return (
            f"{result['same_tokens']:.2%} of the tokens from one seed are equal; CUDA graphs:"
            f" {result['graphs']}"
        )
    return result.get("summary", "")


if __name__ == "__main__":
    main()
