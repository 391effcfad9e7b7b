"""ssd-export export: a checkpoint becomes a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ssd_export.errors import UserError

DTYPES = ("fp32", "fp16", "bf16")


@click.command()
@click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="demo|DIR|HUB_ID",
    help="The checkpoint: the built-in demo, a folder (either layout), or a model hub's owner/name.",
)
@click.option(
    "--policy",
    metavar="NAME",
    help="Which tokens each head keeps: full, streaming-llm, h2o, tova, ssd, ssd-row, ssd-auto, linear or "
    "margin.  [default: ssd-auto where the model's head map has costs, else ssd-row]",
)
@click.option(
    "--budget",
    type=float,
    default=0.2,
    show_default=True,
    metavar="SHARE",
    help="Mean number of cache slots for image tokens, as a share of the 576: above 0, at most 1.",
)
@click.option(
    "--window",
    type=int,
    metavar="SLOTS",
    help="Image-token slots of a spatial head.  [default: 64, less where the budget is small]",
)
@click.option(
    "--evict-every",
    type=int,
    metavar="TOKENS",
    help="Tokens between two releases of a head that ranks by score.  [default: the policy's, mostly 24]",
)
@click.option(
    "--num-recent",
    type=int,
    metavar="TOKENS",
    help="Newest tokens that a head ranking by score always keeps.  [default: the policy's, mostly half]",
)
@click.option(
    "--head-map",
    type=click.Path(path_type=Path),
    metavar="FILE|NAME|random:SEED|swapped",
    help="Head kinds and costs from `ssd-export calibrate`, a built-in map, or a control.  [default: the model's own map]",
)
@click.option(
    "--groups",
    type=click.IntRange(1, 3),
    default=3,
    show_default=True,
    metavar="1|2|3",
    help="How many rules and sizes ssd-auto may use in a layer.",
)
@click.option(
    "--prompt-slots",
    type=int,
    default=64,
    show_default=True,
    metavar="TOKENS",
    help="Cache slots for the prompt: the longest prompt, control tokens included.",
)
@click.option(
    "--dtype",
    default="fp32",
    show_default=True,
    metavar="|".join(DTYPES),
    help="Precision of weights and cache.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle's folder.  [default: bundles/<model>-<policy>-b<budget>-<dtype>]",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there, once the new one is complete.")
def command(
    model: str,
    policy: str | None,
    budget: float,
    window: int | None,
    evict_every: int | None,
    num_recent: int | None,
    head_map: Path | None,
    groups: int,
    prompt_slots: int,
    dtype: str,
    out: Path | None,
    force: bool,
) -> None:
    """Export a checkpoint to a bundle.

    A bundle is a folder of ONNX graphs with a compressed KV cache of fixed size, one copy of the weights, the
    tokenizer and a manifest; `ssd-export generate` draws from it.
    """
    if not 0 < budget <= 1:
        raise UserError(f"--budget {budget:g} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens")
    if prompt_slots < 1:
        raise UserError(
            f"--prompt-slots {prompt_slots} holds no prompt; use 64, or what your longest prompt needs"
        )
    if dtype not in DTYPES:
        raise UserError(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")

    from ssd_export.bundle import remember_latest
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.export.exporter import ExportSpec, export_bundle

    spec = ExportSpec(
        model=model,
        policy=policy,
        budget=budget,
        window=window,
        evict_every=evict_every,
        num_recent=num_recent,
        num_sinks=None,
        head_map=None if head_map is None else str(head_map),
        groups=groups,
        prompt_slots=prompt_slots,
        dtype=dtype,
        out=out,
        force=force,
    )
    with ProgressReport() as progress:
        path = export_bundle(spec, progress=progress)
    try:
        remember_latest(path)
    except OSError as error:
        click.echo(
            f"not remembered as the latest bundle ({error.strerror}): name it with --bundle {path}", err=True
        )
    _print_allocation(path)
    click.echo(path)


def _print_allocation(path: Path) -> None:
    """What ssd-auto chose for each layer and what it is expected to lose, on stderr: stdout is the bundle's folder."""
    from ssd_export.cache.head_map import HeadMap
    from ssd_export.cache.table import PolicyTable
    from ssd_export.cli.allocation_table import group_lines, predicted_lines
    from ssd_export.config import ModelConfig

    written = json.loads((path / "ssd_config.json").read_text(encoding="utf-8"))
    table = PolicyTable.from_dict(written["policy"])
    if table.name != "ssd-auto":
        return
    head_map, config = HeadMap.load(path / "head_map.json"), ModelConfig.from_dict(written["model"])
    for line in group_lines(table) + predicted_lines(head_map, config, table):
        click.echo(line, err=True)
