"""ssd-export sweep: policies and budgets compared on the same prompts and random numbers."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError
from ssd_export.policy.presets import POLICIES, Heads

if TYPE_CHECKING:
    from ssd_export.sweep.spec import SweepSpec
    from ssd_export.sweep.sweep import SweepResult

BUDGETS = "0.1,0.15,0.2,0.3,0.5"


@verb(
    options.model,
    option(
        "--policies",
        default=",".join(
            name for name, row in POLICIES.items() if row.heads is not Heads.EVERYTHING
        ),
        metavar="NAME,...",
        help=(
            "Policies to compare; the full cache is always among them. NAME@KEY=VALUE changes a"
            " number of one: h2o@evict-every=24, ssd-auto@groups=1, streaming-llm@num-sinks=4,"
            " ssd-row@head-map=swapped."
        ),
    ),
    option(
        "--budgets",
        default=BUDGETS,
        metavar="SHARE,...",
        help="Budgets of each policy.",
    ),
    options.num_prompts.but(
        help="Captions for each seed; 0: the teacher-forced loss alone, without generating."
    ),
    option(
        "--seeds", type=int, default=2, metavar="COUNT", help="Seeds 0, 1, ... up to this many."
    ),
    option(
        "--num-scenes",
        type=int,
        default=64,
        metavar="COUNT",
        help="True scenes (or generated images) of the teacher-forced comparison.",
    ),
    options.runner,
    options.provider,
    options.batch,
    option(
        "--jobs",
        type=int,
        metavar="COUNT",
        help=(
            "Processes side by side.  [default: one for each core, as far as memory goes; 1 for"
            " large models, which use every core, and on a GPU]"
        ),
    ),
    options.threads.but(
        help="CPU threads of each process.  [default: 1 beside others, else the runner's]"
    ),
    options.lookahead.but(
        default="",
        metavar="auto|TOKENS,...",
        help=(
            "Also measure lookahead on the first captions, one image at a time in turns with single"
            " steps: passes, tokens a pass, ms a token of each mode."
        ),
    ),
    options.cfg_scale,
    options.temperature,
    options.head_map,
    options.out.but(
        default=Path("sweep"),
        help="Cells, table, plot and contact sheet. What is finished there is not run again.",
    ),
    option(
        "--measurement",
        type=options.FILE,
        metavar="FILE.json",
        help=(
            "Also write the results, with machine and versions, as a measurement for the "
            "documents; plot and sheet beside it.  [default: not written]"
        ),
    ),
    needs=("export",),
)
def command(
    policies: str, budgets: str, lookahead: str, measurement: Path | None, **asked: Any
) -> int:
    """Compare cache policies by quality, memory and speed.

    Every policy at every budget gets the same prompts and the same random numbers. The demo model
    is scored (share of images that show what their captions say, and teacher-forced loss above the
    full cache); any other model is compared with its own full cache. It can be interrupted at any
    time: the table of what is finished is written, and the same command continues. The exit code is
    1 if something failed.
    """
    options.check_runner(asked["runner"], asked["provider"], asked["threads"])
    options.check_num_prompts(asked["num_prompts"], least=0)
    options.check_batch(asked["batch"])
    options.check_sampling(asked["cfg_scale"], asked["temperature"])
    numbers, asked["lookahead"] = _numbers(budgets), options.lookahead_modes(lookahead)
    if measurement is not None:
        from ssd_export.files import check_file

        check_file(measurement)

    from ssd_export.sweep.spec import SweepSpec, check_spec

    names = tuple(name.strip() for name in policies.split(",") if name.strip())
    asked_for = check_spec(SweepSpec(policies=names, budgets=numbers, **asked))

    from ssd_export.cli.progress import ProgressReport
    from ssd_export.sweep.sweep import finished_part, run_sweep, settle

    spec = settle(asked_for)
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
    facts, table, *images = paths = _report(spec, result)
    if measurement is not None:
        from ssd_export.report.measurement import publish

        publish(
            measurement,
            _command_line(sys.argv[1:]),
            json.loads(facts.read_text(encoding="utf-8")),
            images,
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
