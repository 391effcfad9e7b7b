"""ssd-export verify: proofs, on this machine, that a bundle does what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ssd_export.errors import UserError


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
    help="The reference: torch, ONNX Runtime or TensorRT on the bundle's own weights, or the checkpoint in torch.  "
    "[default: checkpoint where it is at hand, else torch]",
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
@click.option("--provider", default="cpu", show_default=True, metavar="cpu|cuda", help="Where it computes.")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="INTEGER", help="Of the picture that is drawn."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    bundle: Path | None,
    against: str | None,
    level: str,
    model: str | None,
    provider: str,
    seed: int,
    as_json: bool,
) -> int:
    """Prove that a bundle does what it claims.

    Climbs from the files' promises over single operators, layers, logits of 576 steps and tokens to the picture,
    proves on the allocated tensors that the cache is compressed, and stops at the first difference, which it
    names with step, layer and head. The exit code is 1 if there is one. The report goes into the bundle as
    reports/verify.json.
    """
    if not 0 <= seed < 1 << 64:
        raise UserError(f"--seed {seed} is outside 0 .. 2**64 - 1; use a number such as 0")

    from ssd_export.bundle import resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.evaluate.verify import VerifySpec, add_report, verify

    path = resolve_bundle(bundle)
    with ProgressReport() as progress:
        report = verify(VerifySpec(path, against, level, model, provider, seed), progress)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print_report(report)
    try:
        add_report(path, report)
    except UserError as error:  # a bundle on read-only media can be verified too
        click.echo(f"the report is not in the bundle: {error}", err=True)
    return 0 if report["ok"] else 1


def _print_report(report: dict[str, Any]) -> None:
    for rung in report["rungs"]:
        click.echo(f"{'ok    ' if rung['ok'] else 'FAILED'} {rung['name']:12} {_figures(rung)}")
        if not rung["ok"]:
            click.echo(f"       {rung['first_divergence']['text']}")
    if report["not_run"]:
        click.echo(f"not run: {', '.join(report['not_run'])}")
    verdict = "verified" if report["ok"] else "NOT verified"
    click.echo(f"{verdict}: {report['runner']} against {report['against']}, {report['dtype']}, policy {report['policy']}")


def _figures(rung: dict[str, Any]) -> str:
    figures = rung["figures"]
    if rung["name"] == "compression" and figures:
        slots = sorted({group["slots"] for group in figures["groups"]})
        return (
            f"{len(figures['groups'])} head groups of {', '.join(map(str, slots))} slots, "
            f"{figures['bytes_allocated']:,} bytes allocated, image slots {figures['image_share_of_full_cache']:.3f} of a full cache"
        )
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
