"""Part three of gpu_report: TensorRT's engines, where TensorRT is."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_part import Result, Task
from benchmarks.gpu_speed import graph_text, measure_speed, speed_table
from ssd_export.tensorrt.target import Batch

TOKENS_BATCH = Batch(1, 2, 4)
SHAPE, BATCHES = "janus-pro-1b", (1, 8, 32, 128)


def tasks(say: Any) -> list[Task]:
    """Tokens with the plugin and without it, then speed."""
    return [
        Task("plugin engine = ONNX Runtime", lambda: check_tokens("on"), 120),
        Task("plain engine = ONNX Runtime", lambda: check_tokens("off"), 120),
        Task("speed of engines", lambda: time_engines(say), 200),
    ]


def check_tokens(plugin: str) -> Result:
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
        "summary": f"{same:.2%} of the tokens from one seed are equal; CUDA graphs:"
        f" {graph_text(graphs)}",
        "rungs": ladder["rungs"],
    }


def time_engines(say: Any) -> Result:
    """Full cache and budget 0.2, every batch."""
    speeds = list(measure_speed(SHAPE, BATCHES, say))
    return {"speeds": [vars(speed) for speed in speeds]}


def tables(results: dict[str, Result], rates: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The table of speeds, where they were measured."""
    from benchmarks.gpu_speed import Speed

    speeds = [Speed(**speed) for result in results.values() for speed in result.get("speeds", [])]
    return [speed_table(SHAPE, speeds, rates)] if speeds else []
