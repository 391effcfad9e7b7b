"""ssd-export verify: proofs, on this machine, that a bundle does what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.errors import UserError
from ssd_export.verify.report import lines_of


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle to verify.  [default: the one exported last from this folder]",
)
@click.option(
    "--against",
    metavar="torch|ort|trt|checkpoint",
    help=(
        "The reference: torch, ONNX Runtime or TensorRT on the bundle's own weights, or the"
        " checkpoint in torch.  [default: checkpoint where it is at hand, else torch]"
    ),
)
@click.option(
    "--level",
    default="image",
    show_default=True,
    metavar="ops|layers|logits|tokens|image",
    help="How far up the ladder to climb.",
)
@click.option(
    "--model",
    metavar="demo|DIR|HUB_ID",
    help="The checkpoint that the bundle was made from.  [default: demo, for its bundles]",
)
@options.provider
@options.seed("Of the picture that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    bundle: Path | None,
    against: str | None,
    level: str,
    model: str | None,
    provider: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Prove that a bundle does what it claims.

    Climbs from the files' promises over single operators, layers, logits of all steps and tokens to
    the picture, proves on the allocated tensors that the cache is compressed, and stops at the
    first difference, which it names with step, layer and head. The exit code is 1 if there is one.
    The report goes into the bundle as reports/verify.json.
    """
    options.check_seed(seed)

    from ssd_export.bundle import resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.verify.verify import VerifySpec, add_report, verify

    path = resolve_bundle(bundle)
    with ProgressReport() as progress:
        report = verify(VerifySpec(path, against, level, model, provider, seed), progress)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo("\n".join(lines_of(report)))
    try:
        add_report(path, report)
    except UserError as error:  # a bundle on read-only media can be verified too
        click.echo(f"the report is not in the bundle: {error}", err=True)
    return 0 if report["ok"] else 1
