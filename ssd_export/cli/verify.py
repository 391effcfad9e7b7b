"""ssd-export verify: proofs, on this machine, that a bundle does what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError
from ssd_export.runtime.runners import DEFAULT, NAMES
from ssd_export.typed_json import report_json
from ssd_export.verify.report import lines_of


@verb(
    options.bundle.but(help=f"The bundle to verify.  {options.LATEST}"),
    option(
        "--against",
        metavar="|".join((*NAMES, "checkpoint")),
        help=(
            "The reference: a runner on the bundle's own weights, or the checkpoint in torch. "
            " [default: checkpoint where it is at hand, else torch]"
        ),
    ),
    option(
        "--level",
        default="image",
        metavar="ops|layers|logits|tokens|image",
        help="The last check to run.",
    ),
    options.model.but(
        default=None,
        help=("The checkpoint that the bundle was made from.  [default: a demo, for its bundles]"),
    ),
    options.lora.but(
        help=(
            "The LoRA adapter that was merged into the bundle, of --model's checkpoint. "
            " [default: none]"
        )
    ),
    options.provider,
    options.threads,
    options.seed.but(help="Random seed of the image."),
    options.as_json.but(help="Print the report as one JSON object."),
    needs=("export", "ort"),
)
def command(as_json: bool, bundle: Path | None, **asked: Any) -> int:
    """Prove that a bundle does what it claims.

    Checks, in this order, the files' contract, single operators, layers, logits of all steps,
    tokens and the image, and proves on the allocated tensors that the cache is compressed. It stops
    at the first difference and names step, layer and head; the exit code is then 1. The report goes
    into the bundle as reports/verify.json.
    """
    options.check_seed(asked["seed"])
    options.check_runner(DEFAULT, asked["provider"], asked["threads"])

    from ssd_export.bundle import resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.verify.spec import VerifySpec, check_spec

    check_spec(VerifySpec(Path(), **asked))
    path = resolve_bundle(bundle)

    from ssd_export.verify.verify import add_report, verify

    with ProgressReport() as progress:
        report = verify(VerifySpec(path, **asked), progress)
    if as_json:
        click.echo(report_json(report))
    else:
        click.echo("\n".join(lines_of(report)))
    try:
        add_report(path, report)
    except UserError as error:  # a bundle on read-only media can be verified too
        click.echo(f"the report is not in the bundle: {error}", err=True)
    return 0 if report["ok"] else 1
