"""ssd-export plan: what every stage will take, before any work, and settings that fit."""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.dtypes import MODEL_DTYPES
from ssd_export.errors import UserError
from ssd_export.typed_json import report_json

if TYPE_CHECKING:
    from ssd_export.plan.fit import Settings
    from ssd_export.plan.stages import Plan

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", re.IGNORECASE)
WIDTH_OF_A_PIPE = 120
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """The machine that will generate. memory_bytes: usable; flavor: None for a machine that needs
    no engine; shares_memory: its GPU and its system have one memory.
    """

    name: str
    memory_bytes: int | None
    flavor: str | None
    shared_weights: bool = True
    shares_memory: bool = False
    workspace_bytes: int = 0


@dataclass(frozen=True)
class PlanSpec:
    """Options of plan; None leaves a number to --fit, or to its default."""

    model: str
    policy: str | None
    budget: float | None
    weights: str | None
    head_weights: str | None
    kv_dtype: str
    batch: int | None
    decoder_batch: int
    prompt_slots: int | None
    dtype: str
    num_layers: int | None


@verb(
    options.model,
    options.policy,
    options.budget,
    options.weights.but(help="As for export.  [default: none]"),
    options.head_weights,
    options.kv_dtype.but(default="model", help="As for export."),
    options.batch.but(type=click.IntRange(min=1), help="Images generated at once.  [default: 1]"),
    options.decoder_batch.but(type=click.IntRange(min=1), help="Images decoded to pixels at once."),
    options.prompt_slots,
    options.dtype.but(default="fp16", help="As for export."),
    options.num_layers.but(help="As for export.  [default: all]"),
    options.target.but(
        metavar="NAME|8GB",
        help=(
            "Device that will generate: a target of build-engine, or a size of GPU memory; "
            "cpu: this machine, with ONNX Runtime.  [default: cpu]"
        ),
    ),
    option(
        "--fit",
        "fits",
        is_flag=True,
        help="Choose batch, budget and weights, where not given, for --target.",
    ),
    options.as_json,
    needs=("export",),
)
def command(target: str | None, fits: bool, as_json: bool, **asked: Any) -> None:
    """Estimate memory, disk and time of every stage, and say what does not fit.

    Nothing is downloaded, read or written. export, build-engine and generate refuse by the same
    numbers.
    """
    spec = PlanSpec(**asked)
    budget = options.budget_of(spec.budget, spec.policy)
    options.check_prompt_slots(spec.prompt_slots)
    options.check_kv_dtype(spec.kv_dtype)
    options.check_choice("--dtype", spec.dtype, MODEL_DTYPES)

    from ssd_export.model.families import family_of
    from ssd_export.model.hub import is_hub_id
    from ssd_export.plan.fit import BATCHES, BUDGETS, WEIGHTS, Settings, fit

    device = find_device(target or "cpu")
    options.check_weights(
        spec.weights or "none",
        spec.head_weights,
        None if device.flavor is None or SIZE.fullmatch(target or "") else target,
    )
    settings = Settings(spec.weights or "none", budget, spec.batch or 1)
    plan = plan_of(spec, device, settings)
    if plan.download_bytes and not is_hub_id(spec.model):
        log.info(
            "%s is not here: planned by the shapes of the published model; export takes a folder or"
            " a hub id, such as %s",
            spec.model,
            family_of(plan.config).example,
        )
    if fits:
        if device.memory_bytes is None:
            raise UserError(
                "--fit needs the memory to fit into; give --target 8GB, or a target such as"
                " jetson-orin-nano"
            )
        settings, plan = fit(
            lambda chosen: plan_of(spec, device, chosen),
            lambda made: needed_there(made, device),
            device.memory_bytes,
            [spec.weights] if spec.weights else WEIGHTS,
            [spec.budget] if spec.budget else BUDGETS,
            [spec.batch] if spec.batch else BATCHES,
        )
    problems = what_does_not_fit(plan, device)
    if as_json:
        click.echo(report_json(facts(plan, device, settings, problems)))
    else:
        _print_tables(plan, device)
        if fits:
            for line in commands(spec, device, settings, target, plan.bundle):
                click.echo(line)
    if problems:
        raise UserError("; ".join(problems))


def find_device(target: str) -> Device:
    """The device of a target's name, of `cpu` or of a memory size. Raises: UserError for any other
    name.
    """
    from ssd_export.machine import free_bytes
    from ssd_export.plan.device import usable_bytes
    from ssd_export.tensorrt.target import memory_of, read_target

    size = SIZE.fullmatch(target)
    if size:
        unit = 1 << 30 if size[2].lower() == "gib" else 10**9
        return Device(target, int(float(size[1]) * unit), "tensorrt-rtx")
    memory, shared = memory_of(target)
    if target == "cpu":
        return Device("this machine", free_bytes(), None)
    recipe = read_target(target)
    return Device(
        recipe.title,
        usable_bytes(memory, shared) or None,
        recipe.flavors[0],
        recipe.shared_weights,
        shared,
        recipe.workspace_mib << 20,
    )


def plan_of(spec: PlanSpec, device: Device, settings: Settings) -> Plan:
    """The plan of these settings. Raises: UserError for a model or policy that will not do."""
    from ssd_export.export.exporter import ExportSpec, plan_export
    from ssd_export.plan.memory import export_bytes
    from ssd_export.plan.sizes import WeightSizes
    from ssd_export.plan.stages import Plan
    from ssd_export.policy.presets import DEFAULT_GROUPS

    made = plan_export(
        ExportSpec(
            model=spec.model,
            policy=spec.policy,
            budget=settings.budget,
            window=None,
            evict_every=None,
            num_recent=None,
            num_sinks=None,
            head_map=None,
            groups=DEFAULT_GROUPS,
            prompt_slots=spec.prompt_slots,
            dtype=spec.dtype,
            out=None,
            force=False,
            weights=settings.weights,
            head_weights=spec.head_weights,
            kv_dtype=spec.kv_dtype,
            num_layers=spec.num_layers,
        ),
        download=False,
    )
    is_here = made.checkpoint.path != Path()
    stored = sum(map(made.checkpoint.stored_bytes, made.checkpoint.names()))
    return Plan(
        config=made.checkpoint.config,
        table=made.table,
        sizes=WeightSizes.of(
            (w.name, str(w.dtype).removeprefix("torch."), w.num_bytes) for w in made.weights
        ),
        dtype=MODEL_DTYPES[spec.dtype].name,
        num_images=settings.num_images,
        decoder_batch=spec.decoder_batch,
        download_bytes=0 if is_here else stored,
        export_peak=export_bytes(
            (weight.working_bytes for weight in made.weights),
            0 if is_here else made.checkpoint.config.vocab_size,
        ),
        flavor=device.flavor,
        shared_weights=device.shared_weights,
        workspace_bytes=device.workspace_bytes,
        bundle=made.out,
    )


def needed_there(plan: Plan, device: Device) -> int:
    """Bytes that generating takes of the device's memory."""
    return plan.generation_peak if device.flavor is None else plan.device.total


def what_does_not_fit(plan: Plan, device: Device) -> list[str]:
    """A line for each stage or device whose memory or disk will not do."""
    from ssd_export.machine import free_bytes, free_disk_bytes, gib
    from ssd_export.plan.stages import BUILD_ON_DEVICE

    problems = []
    memory, disk = free_bytes(), free_disk_bytes(Path())
    for stage in plan.stages():
        elsewhere = stage.name == BUILD_ON_DEVICE or (
            device.flavor is not None and stage.name.startswith("generate on this CPU")
        )
        if memory is not None and stage.host_bytes and stage.host_bytes > memory and not elsewhere:
            problems.append(
                f"{stage.name} needs {gib(stage.host_bytes)} of memory and {gib(memory)} are free"
            )
    written = sum(stage.disk_bytes for stage in plan.stages())
    if disk is not None and written > disk:
        problems.append(f"all stages write {gib(written)} and {gib(disk)} of disk are free")
    needed = needed_there(plan, device)
    if (
        device.flavor is not None
        and device.memory_bytes is not None
        and needed > device.memory_bytes
    ):
        problems.append(
            f"generating needs {gib(needed)} of the {gib(device.memory_bytes)} of {device.name}"
        )
    if problems:
        problems.append("use --fit, or --weights int4, a smaller --budget, a smaller --batch")
    return problems + _build_on_a_board(plan, device)


def _build_on_a_board(plan: Plan, device: Device) -> list[str]:
    """A line where a board cannot build engines that it can run: swap holds what is left over."""
    from ssd_export.machine import gib
    from ssd_export.plan.stages import BUILD_ON_DEVICE

    needed = next((s.host_bytes or 0 for s in plan.stages() if s.name == BUILD_ON_DEVICE), 0)
    if not device.shares_memory or not device.memory_bytes or needed <= device.memory_bytes:
        return []
    return [
        f"build-engine runs on {device.name} and needs {gib(needed)} of its"
        f" {gib(device.memory_bytes)}: add {gib(needed - device.memory_bytes)} of swap there"
    ]


def facts(plan: Plan, device: Device, settings: Settings, problems: list[str]) -> dict[str, Any]:
    """Everything that plan shows, as plain data, in bytes. host.process: the part of host.export
    that is this process.
    """
    from ssd_export.machine import resident_bytes

    return {
        "settings": asdict(settings),
        "policy": plan.table.name,
        "stages": [asdict(stage) for stage in plan.stages()],
        "host": {
            "export": plan.export_peak,
            "generation": plan.generation_peak,
            "process": resident_bytes(),
        },
        "disk": {"bundle": plan.bundle_bytes, "weights": asdict(plan.sizes)},
        "cache": plan.cache_bytes,
        "device": {
            **asdict(plan.device),
            "total": plan.device.total,
            "memory": device.memory_bytes,
        },
        "does_not_fit": problems,
    }


def commands(
    spec: PlanSpec, device: Device, settings: Settings, target: str | None, bundle: Path
) -> list[str]:
    """The command lines that do what was planned, and a comment where the machine changes.

    Args: bundle: the folder that export writes; its machine knows it as the latest one.
    """
    from ssd_export.plan.stages import BUILDS_ANYWHERE

    parts = [
        f"ssd-export export --model {shlex.quote(spec.model)} --budget {settings.budget:g}"
        f" --dtype {spec.dtype}"
    ]
    if settings.weights != "none":
        parts.append(f"--weights {settings.weights}")
    if spec.head_weights is not None:
        parts.append(f"--head-weights {spec.head_weights}")
    parts += [f"--policy {spec.policy}"] * (spec.policy is not None) + ["--kv-dtype int8"] * (
        spec.kv_dtype == "int8"
    )
    parts += [f"--prompt-slots {spec.prompt_slots}"] * (spec.prompt_slots is not None)
    lines = [" ".join(parts)]
    on_device = ""
    if device.flavor is not None:
        name = "rtx" if SIZE.fullmatch(target or "") else target
        if device.flavor not in BUILDS_ANYWHERE:
            lines.append(f"# then on {device.name}, with a copy of {bundle}:")
            on_device = f"--bundle {shlex.quote(bundle.name)} "
        lines.append(
            f"ssd-export build-engine {on_device}--target {name} --batch"
            f" 1:{settings.num_images}:{settings.num_images}"
        )
    runner = "" if device.flavor is None else "--runner trt "
    lines.append(
        f"ssd-export generate {on_device}{runner}--batch {settings.num_images}"
        ' "a red circle above a blue square"'
    )
    return lines


def _print_tables(plan: Plan, device: Device) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ssd_export.machine import gib

    def table(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            made.add_column(column, justify="right" if index else "left")
        return made

    stages = table("stage", "host memory", "disk", "device memory", "time")
    for stage in plan.stages():
        sizes = (stage.host_bytes, stage.disk_bytes, stage.device_bytes)
        stages.add_row(
            stage.name,
            *("unknown" if size is None else gib(size) if size else "-" for size in sizes),
            stage.time,
        )
    parts = table(f"device memory, {plan.num_images} at once", "size")
    for name, size in plan.device.parts():
        parts.add_row(name, gib(size))
    parts.add_row("all", gib(plan.device.total))
    if device.memory_bytes is not None:
        parts.add_row(f"there is on {device.name}", gib(device.memory_bytes))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    console.print(stages, parts)
