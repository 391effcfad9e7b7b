"""ssd-export sweep: policies and budgets compared on the same prompts and random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ssd_export.errors import UserError

POLICIES = "ssd-auto,ssd-row,ssd,streaming-llm,h2o,tova,linear,margin"
BUDGETS = "0.1,0.15,0.2,0.3,0.5"


@click.command()
@click.option(
    "--model", default="demo", show_default=True, metavar="demo|DIR|HUB_ID", help="The checkpoint, as for export."
)
@click.option(
    "--policies",
    default=POLICIES,
    show_default=True,
    metavar="NAME,...",
    help="Policies to compare; the full cache is always among them.",
)
@click.option(
    "--budgets", default=BUDGETS, show_default=True, metavar="SHARE,...", help="Budgets of each policy."
)
@click.option(
    "--num-prompts", type=int, default=300, show_default=True, metavar="COUNT", help="Captions for each seed."
)
@click.option(
    "--seeds", type=int, default=2, show_default=True, metavar="COUNT", help="Seeds 0, 1, ... up to this many."
)
@click.option(
    "--num-scenes",
    type=int,
    default=64,
    show_default=True,
    metavar="COUNT",
    help="True scenes (or drawn pictures) of the teacher-forced comparison.",
)
@click.option(
    "--runner",
    default="ort",
    show_default=True,
    metavar="ort|torch|trt",
    help="Who draws: ONNX Runtime, torch or TensorRT.",
)
@click.option("--provider", default="cpu", show_default=True, metavar="cpu|cuda", help="Where it draws.")
@click.option(
    "--batch", type=int, default=16, show_default=True, metavar="COUNT", help="Pictures drawn at once."
)
@click.option(
    "--cfg-scale", type=float, metavar="FACTOR", help="Strength of guidance; 1 is none.  [default: the model's]"
)
@click.option(
    "--temperature", type=float, metavar="FACTOR", help="0 is greedy.  [default: the model's]"
)
@click.option(
    "--head-map",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Head kinds from `ssd-export calibrate`.  [default: the model's own map]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("sweep"),
    show_default=True,
    metavar="DIR",
    help="Cells, table, plot and contact sheet. What is finished there is not run again.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path),
    metavar="FILE.md",
    help="Also write table, plot and sheet into this document, between its sweep comments.  [default: no]",
)
def command(
    model: str,
    policies: str,
    budgets: str,
    num_prompts: int,
    seeds: int,
    num_scenes: int,
    runner: str,
    provider: str,
    batch: int,
    cfg_scale: float | None,
    temperature: float | None,
    head_map: Path | None,
    out: Path,
    docs: Path | None,
) -> None:
    """Compare cache policies by quality, memory and speed.

    Every policy at every budget draws the same prompts with the same random numbers. The demo model is scored
    (share of pictures that show what their captions say, and teacher-forced loss above the full cache); any
    other model is compared with its own full cache. Interrupt it at any time: run it again and it goes on.
    """
    numbers = _numbers(budgets)
    if docs is not None:
        from ssd_export.runtime.pictures import check_file

        check_file(docs)

    from ssd_export.cli.progress import ProgressReport
    from ssd_export.evaluate.sweep import SweepSpec, check_spec, run_sweep
    from ssd_export.evaluate.sweep_report import write_report

    spec = check_spec(
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
            head_map=None if head_map is None else str(head_map),
            out=out,
        )
    )
    with ProgressReport() as progress:
        result = run_sweep(spec, progress)
    facts, table, *pictures = paths = write_report(spec, result)
    if docs is not None:
        from ssd_export.evaluate.pages import write_sweep_part

        write_sweep_part(docs, json.loads(facts.read_text(encoding="utf-8")), pictures)
    click.echo(table.read_text(encoding="utf-8"))
    click.echo(", ".join(str(path) for path in paths))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--budgets {text!r} is not a list of numbers; use 0.1,0.2,0.5") from None
