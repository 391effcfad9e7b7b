"""ssd-export sweep: policies and budgets compared on the same prompts and random numbers."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_export.cli import options
from ssd_export.errors import UserError
from ssd_export.policy.presets import POLICIES, Heads

if TYPE_CHECKING:
    from ssd_export.sweep.spec import SweepSpec
    from ssd_export.sweep.sweep import SweepResult

BUDGETS = "0.1,0.15,0.2,0.3,0.5"


@click.command()
@options.model
@click.option(
    "--policies",
    default=",".join(name for name, row in POLICIES.items() if row.heads is not Heads.EVERYTHING),
    show_default=True,
    metavar="NAME,...",
    help=(
        "Policies to compare; the full cache is always among them. NAME@KEY=VALUE changes a number"
        " of one: h2o@evict-every=24, ssd-auto@groups=1, streaming-llm@num-sinks=4,"
        " ssd-row@head-map=swapped."
    ),
)
@click.option(
    "--budgets",
    default=BUDGETS,
    show_default=True,
    metavar="SHARE,...",
    help="Budgets of each policy.",
)
@click.option(
    "--num-prompts",
    type=int,
    default=300,
    show_default=True,
    metavar="COUNT",
    help="Captions for each seed; 0: the teacher-forced loss alone, without drawing.",
)
@click.option(
    "--seeds",
    type=int,
    default=2,
    show_default=True,
    metavar="COUNT",
    help="Seeds 0, 1, ... up to this many.",
)
@click.option(
    "--num-scenes",
    type=int,
    default=64,
    show_default=True,
    metavar="COUNT",
    help="True scenes (or drawn pictures) of the teacher-forced comparison.",
)
@options.runner
@options.provider
@options.batch
@click.option(
    "--jobs",
    type=int,
    metavar="COUNT",
    help=(
        "Processes that draw side by side, one thread each.  [default: one for each core, as far as"
        " memory goes; 1 for large models, which use every core, and on a GPU]"
    ),
)
@options.cfg_scale
@options.temperature
@options.head_map
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("sweep"),
    show_default=True,
    metavar="DIR",
    help="Cells, table, plot and contact sheet. What is finished there is not run again.",
)
@click.option(
    "--measurement",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help=(
        "Also write the results, with machine and versions, where documents are made from; plot and"
        " sheet beside it.  [default: no]"
    ),
)
def command(
    model: str,
    policies: str,
    budgets: str,
    num_prompts: int,
    seeds: int,
    num_scenes: int,
    runner: str,
    provider: str | None,
    batch: int | None,
    jobs: int | None,
    cfg_scale: float | None,
    temperature: float | None,
    head_map: str | None,
    out: Path,
    measurement: Path | None,
) -> int:
    """Compare cache policies by quality, memory and speed.

    Every policy at every budget draws the same prompts with the same random numbers. The demo model
    is scored (share of pictures that show what their captions say, and teacher-forced loss above
    the full cache); any other model is compared with its own full cache. Interrupt it at any time:
    the table of what is finished is written, and run again it goes on. The exit code is 1 if
    something failed.
    """
    numbers = _numbers(budgets)
    if measurement is not None:
        from ssd_export.files import check_file

        check_file(measurement)

    from ssd_export.cli.progress import ProgressReport
    from ssd_export.sweep.spec import SweepSpec
    from ssd_export.sweep.sweep import finished_part, run_sweep, settle

    spec = settle(
        SweepSpec(
            model=model,
            policies=tuple(name.strip() for name in policies.split(",") if name.strip()),
            budgets=numbers,
            num_prompts=num_prompts,
            seeds=seeds,
            num_scenes=num_scenes,
            batch=batch,
            runner=runner,
            provider=provider,
            cfg_scale=cfg_scale,
            temperature=temperature,
            head_map=head_map,
            out=out,
            jobs=jobs,
        )
    )
    try:
        with ProgressReport() as progress:
            result = run_sweep(spec, progress)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or SIGTERM
        try:
            click.echo(
                f"so far: {', '.join(map(str, _report(spec, finished_part(spec))))}", err=True
            )
        except UserError as error:  # nothing to make a table of yet
            click.echo(str(error), err=True)
        raise
    facts, table, *pictures = paths = _report(spec, result)
    if measurement is not None:
        from ssd_export.report.measurement import publish

        publish(
            measurement,
            _command_line(sys.argv[1:]),
            json.loads(facts.read_text(encoding="utf-8")),
            pictures,
        )
    click.echo(table.read_text(encoding="utf-8"))
    click.echo(", ".join(str(path) for path in paths))
    for name, reason in result.failed.items():
        click.echo(f"failed: {name}: {reason}; run the sweep again to try it once more", err=True)
    return 1 if result.failed else 0


def _report(spec: SweepSpec, result: SweepResult) -> list[Path]:
    from ssd_export.sweep.report import write_report

    return write_report(spec, result)


def _command_line(arguments: list[str]) -> str:
    """The command as somebody else would type it: without --out, a place on one machine."""
    kept = [argument for argument in arguments if not argument.startswith("--out=")]
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return shlex.join(["python", "cli.py", *kept])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--budgets {text!r} is not a list of numbers; use 0.1,0.2,0.5") from None
