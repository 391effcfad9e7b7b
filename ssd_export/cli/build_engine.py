"""ssd-export build-engine: TensorRT engines of a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb

if TYPE_CHECKING:
    from ssd_export.tensorrt.engine_manifest import EngineEntry
    from ssd_export.tensorrt.plan import BuildPlan

FLAVORS = ("auto", "tensorrt", "tensorrt-rtx")
PLUGIN = ("auto", "on", "off")


@verb(
    options.bundle.but(help=f"The bundle to build from and into.  {options.LATEST}"),
    options.target.but(
        default="auto",
        metavar="auto|rtx|jetson-orin|jetson-thor|ampere|ada|hopper|blackwell",
        help=(
            "The GPUs to build for; auto: this machine's GPU, else rtx. A target that only its own"
            " machine can build for is prepared: the bundle gets what the board lacks."
        ),
    ),
    option(
        "--flavor",
        default="auto",
        metavar="|".join(FLAVORS),
        help="TensorRT-RTX needs no GPU to build; TensorRT builds on the machine that will run.",
    ),
    option(
        "--plugin",
        default="auto",
        metavar="|".join(PLUGIN),
        help=(
            "Attention by the plugin's kernel, with caches written in place, or by ordinary "
            "operators; auto: by the plugin where library and kernel are available."
        ),
    ),
    option(
        "--top-k",
        is_flag=True,
        help=(
            "Also build the two graphs that generate --top-k needs; without it the engines sample"
            " among all codes."
        ),
    ),
    options.lookahead.but(
        default="auto",
        metavar="auto|off|TOKENS",
        help=(
            "Also build the graph that generate --lookahead needs, for passes of so many tokens."
            " auto: 16, where the bundle was exported for lookahead or evicts nothing."
        ),
    ),
    options.batch.but(
        type=str, metavar="MIN:OPT:MAX", help="Images at once.  [default: the target's]"
    ),
    option(
        "--workspace",
        "workspace_mib",
        type=click.IntRange(1, 1 << 20),
        metavar="MIB",
        help="Scratch memory on the device that a layer may use.  [default: the target's]",
    ),
    option(
        "--timing-cache",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help=(
            "File of earlier builds' layer timings, read and extended.  [default: one beside "
            "the engines]"
        ),
    ),
    options.force_memory,
    option(
        "--dry-run", is_flag=True, help="Say what would be built and what it needs; build nothing."
    ),
)
def command(
    bundle: Path | None, batch: str | None, lookahead: str, dry_run: bool, **asked: Any
) -> None:
    """Build TensorRT engines of a bundle, into the bundle.

    Prefill and decode step share one copy of the weights on the device (quantized matrices
    excepted: each engine has its own). engine.json beside the engines says what they were built
    from and for; a loader checks it before it loads them.
    """
    options.check_choice("--flavor", asked["flavor"], FLAVORS)
    options.check_choice("--plugin", asked["plugin"], PLUGIN)

    from ssd_export.bundle import resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.tensorrt.build import build_engines, prepare
    from ssd_export.tensorrt.plan import BuildSpec, plan_build
    from ssd_export.tensorrt.target import Batch

    sizes = None if batch is None else Batch.parse(batch)
    spec = BuildSpec(
        bundle=resolve_bundle(bundle),
        batch=sizes,
        lookahead=options.window_of(lookahead, "build-engine"),
        **asked,
    )
    plan = plan_build(spec)
    for line in plan_lines(plan):
        click.echo(line, err=True)
    if dry_run:
        return
    if plan.flavor is None:
        for name in prepare(plan):
            click.echo(plan.bundle.path / name)
        return
    started = time.monotonic()

    def finished(name: str, entry: EngineEntry, share: float) -> None:
        left = (time.monotonic() - started) * (1 - share) / share
        told = f"; about {left:.0f} s left" if share < 1 else ""
        click.echo(result_line(name, entry) + told, err=True)

    def stopping() -> None:
        click.echo("stopping: TensorRT ends the step that it is in", err=True)

    with ProgressReport() as progress:
        manifest = build_engines(plan, progress, finished, stopping)
    for text in manifest.warnings:
        click.echo(f"warning: {text}", err=True)
    click.echo(plan.bundle.path / plan.folder)


def plan_lines(plan: BuildPlan) -> list[str]:
    """Lines that say which engines are built, for which GPUs, and what they need."""
    from ssd_export.machine import gib

    gpus = ", ".join(f"{capability / 10:.1f}" for capability in plan.capabilities)
    lines = [f"target: {plan.target.name} ({plan.target.title}), compute capability {gpus}"]
    if plan.flavor is None:
        return lines + [
            "TensorRT builds for this target on its own machine. Here the plugin's decode step is"
            " prepared, kernel inside; then copy the bundle there and run: ssd-export build-engine"
            f" --bundle DIR --target {plan.target.name}"
        ]
    free = "unknown" if plan.free_bytes is None else gib(plan.free_bytes)
    lines += [
        f"flavor: {plan.flavor.name} {plan.flavor.version}",
        (
            f"decode step: {plan.step.form}"
            + (f", {plan.step.library}" if plan.step.library else "")
            + (f" (no plugin: {plan.step.why_not})" if plan.step.why_not else "")
        ),
        "prefill: "
        + (
            f"keys and values copied into the caches ({plan.step.why_copies})"
            if plan.step.why_copies
            else "keys and values written into the caches"
        ),
        (
            f"batch: {plan.batch.min} to {plan.batch.max} images, the decode step tuned for"
            f" {_tuned_for(plan)}; prompts of up to {plan.prompt_slots} tokens"
        ),
        f"graphs: {', '.join(spec.name for spec in plan.graphs)}",
        (
            f"lookahead: {plan.window} tokens a pass"
            if plan.window
            else f"lookahead: none ({plan.no_window})"
        ),
        (
            f"memory: about {gib(plan.needed_bytes)} needed, {free} free; workspace"
            f" {plan.workspace_mib} MiB"
        ),
        f"into: {plan.bundle.path / plan.folder}",
    ]
    if plan.timing_cache and plan.flavor.builds_anywhere:
        lines.append(f"timing cache: {plan.flavor.name} has none, --timing-cache is not used")
    return lines


def _tuned_for(plan: BuildPlan) -> str:
    return " and ".join(str(profile.images[1]) for profile in plan.profiles("decode_step"))


def result_line(name: str, entry: EngineEntry) -> str:
    """Size, layers and time of an engine."""
    num_layers, num_plugin = sum(entry.layers.values()), entry.layers.get("PluginV3", 0)
    layers = (
        f", {num_layers} layers" + (f" ({num_plugin} of the plugin)" if num_plugin else "")
        if num_layers
        else ""
    )
    return f"{name}: {entry.bytes / 1e6:.1f} MB{layers}, {entry.seconds:.1f} s"
