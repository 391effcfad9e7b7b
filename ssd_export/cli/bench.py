"""ssd-export bench: speed and memory, beside two baselines in the same run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError
from ssd_export.typed_json import report_json

if TYPE_CHECKING:
    from ssd_export.bench.spec import BenchSpec


@verb(
    options.bundle.but(
        multiple=True,
        help=(
            "A bundle to measure; give it again for another one of the same checkpoint. "
            f" {options.LATEST}"
        ),
    ),
    options.runner,
    options.provider,
    options.batch.but(type=str, default="1", metavar="COUNT,...", help="Images at once."),
    option(
        "--baselines",
        default="transformers,full",
        metavar="NAME,...",
        help=(
            "Baselines in the same run: transformers with its own cache, the full cache in "
            "the same runner, or none."
        ),
    ),
    option(
        "--steps",
        type=int,
        default=96,
        metavar="COUNT",
        help="Decode steps to time, fewer than an image has tokens.",
    ),
    option(
        "--rounds",
        type=int,
        default=None,
        show_default=False,
        metavar="COUNT",
        help=(
            "Whole batches of images to time for each cache, in turns; 0: none, images a minute"
            " then follow from the steps.  [default: 7 for small models, 0 for others]"
        ),
    ),
    options.lookahead.but(
        default="",
        metavar="auto|TOKENS,...",
        help=(
            "Also generate whole images with lookahead, in turns with single steps: passes, tokens"
            " a pass, ms a token of each mode."
        ),
    ),
    options.threads.but(
        help="CPU threads of everything measured.  [default: all, 1 for small models]"
    ),
    options.model.but(
        default=None,
        help="The bundles' checkpoint, for the baselines.  [default: a demo, for its bundles]",
    ),
    option(
        "--profile",
        is_flag=True,
        help="Also report the operators in which ONNX Runtime spends a step.",
    ),
    options.as_json.but(help="Print one JSON object instead of tables."),
    needs=("export",),
)
def command(
    bundle: tuple[Path, ...],
    batch: str,
    baselines: str,
    lookahead: str,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure speed and memory of bundles.

    Time to the first token, milliseconds per token, image tokens per second, images per minute,
    peak memory, cache bytes and load time, with the share of what this machine's memory and
    arithmetic allow (measured in the same run). The baselines run in the same run, each measurement
    in a separate process. The report goes into the bundle as reports/bench.json.
    """
    options.check_runner(asked["runner"], asked["provider"], asked["threads"])
    batches = _counts(batch)
    for count in batches:
        options.check_batch(count)

    from ssd_export.bench.spec import BenchSpec, check_spec
    from ssd_export.bundle import resolve_bundle

    names = (name.strip() for name in baselines.split(","))
    wanted = tuple(name for name in names if name not in ("", "none"))
    asked["lookahead"] = options.lookahead_modes(lookahead)
    check_spec(BenchSpec((), batches=batches, baselines=wanted, **asked))
    paths = bundle or (resolve_bundle(None),)
    spec = check_spec(BenchSpec(paths, batches=batches, baselines=wanted, **asked))

    from ssd_export.bench.bench import run_bench
    from ssd_export.bench.report import bench_tables, lines_of
    from ssd_export.bundle import open_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.report.environment import busy_note
    from ssd_export.report.measurement import measurement

    note = busy_note()
    with ProgressReport() as progress:
        results = run_bench(spec, progress)
    measured = measurement(command_line(spec), results, note)
    text = report_json(measured)
    for path in paths:
        try:
            open_bundle(path).add_files({"reports/bench.json": (text + "\n").encode()})
        except UserError as error:  # a bundle on read-only media can be measured too
            click.echo(f"the report is not in the bundle: {error}", err=True)
    if as_json:
        click.echo(text)
        return
    if note:
        click.echo(note)
    for table in bench_tables(results):
        click.echo("\n".join(lines_of(table)))


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--batch {text!r} is not a list of numbers; use 1,8,32") from None


def command_line(spec: BenchSpec) -> str:
    """The command that measures this spec, with everything that is not a default."""
    from ssd_export.runtime.runners import find_runner

    default, kind = type(spec)(()), find_runner(spec.runner)
    words = ["python", "cli.py", "bench"]
    for path in spec.bundles:
        words += ["--bundle", str(path)]
    values = {
        "runner": spec.runner,
        "provider": kind.provider(spec.provider),
        "batch": ",".join(map(str, spec.batches)),
        "baselines": ",".join(spec.baselines) or "none",
        "steps": spec.steps,
        "rounds": spec.rounds,
        "lookahead": ",".join(map(str, spec.lookahead)) or None,
        "threads": spec.threads,
        "model": spec.model,
    }
    usual = {
        "runner": default.runner,
        "provider": kind.provider(),
        "batch": "1",
        "baselines": ",".join(default.baselines),
        "steps": default.steps,
        "rounds": None,
        "lookahead": None,
        "threads": None,
        "model": None,
    }
    for name, value in values.items():
        if value != usual[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words + ["--profile"] * spec.profile)
