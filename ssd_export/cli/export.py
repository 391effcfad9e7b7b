"""ssd-export export: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.dtypes import MODEL_DTYPES
from ssd_export.errors import UserError
from ssd_export.policy.presets import DEFAULT_GROUPS, MAX_GROUPS, POLICIES, default_policy

WEIGHTS = ("none", "int8", "int4", "fp8")


@click.command()
@options.model
@click.option(
    "--policy",
    metavar="NAME",
    help=(
        f"Which tokens each head keeps: {', '.join(POLICIES)}.  [default:"
        f" {default_policy(True, False)} where the model's head map has costs, else"
        f" {default_policy(False, False)}]"
    ),
)
@click.option(
    "--budget",
    type=float,
    default=0.2,
    show_default=True,
    metavar="SHARE",
    help="Mean number of cache slots for image tokens, as a share of all image tokens: above 0, at most 1.",
)
@click.option(
    "--window",
    type=int,
    metavar="SLOTS",
    help=(
        "Image-token slots of a spatial head.  [default: two grid rows and two thirds, less where the"
        " budget is small]"
    ),
)
@click.option(
    "--evict-every",
    type=int,
    metavar="TOKENS",
    help=(
        "Tokens between two releases of a head that ranks by score.  [default: the policy's,"
        " mostly a grid row]"
    ),
)
@click.option(
    "--num-recent",
    type=int,
    metavar="TOKENS",
    help=(
        "Newest tokens that a head ranking by score always keeps.  [default: the policy's, mostly"
        " half]"
    ),
)
@options.head_map
@click.option(
    "--groups",
    type=click.IntRange(1, MAX_GROUPS),
    default=DEFAULT_GROUPS,
    show_default=True,
    metavar="1|2|3",
    help="How many rules and sizes ssd-auto may use in a layer.",
)
@options.prompt_slots
@click.option(
    "--dtype",
    default="fp32",
    show_default=True,
    metavar="|".join(MODEL_DTYPES),
    help="Precision of weights and cache.",
)
@click.option(
    "--weights",
    default="none",
    show_default=True,
    metavar="|".join(WEIGHTS),
    help=(
        "Store the layers' matrices in fewer bits: int8 by output channel, int4 in blocks of 128"
        " inputs, fp8 by output channel for a --target that has it. Everything else keeps --dtype."
    ),
)
@click.option(
    "--kv-dtype",
    default="model",
    show_default=True,
    metavar="model|int8",
    help="Keys and values of the cache: as --dtype, or int8 with a scale for every token and head.",
)
@click.option(
    "--target",
    metavar="NAME",
    help=(
        "What will run the bundle, as for build-engine; what it cannot run is refused.  [default:"
        " anything]"
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=(
        "The bundle's folder.  [default:"
        " bundles/<model>-<policy>-b<budget>-<dtype>[-<weights>][-kv-<kv-dtype>]]"
    ),
)
@click.option(
    "--force", is_flag=True, help="Replace a bundle that is there, once the new one is complete."
)
@click.option(
    "--resume",
    is_flag=True,
    help=(
        "Go on where Ctrl-C, a signal, a crash or a full disk stopped the same export; begin where"
        " there is nothing."
    ),
)
@click.option(
    "--num-layers",
    type=int,
    metavar="COUNT",
    help="Only the first layers: a quick trial of a big model.  [default: all]",
)
@click.option(
    "--revision",
    metavar="BRANCH|TAG|COMMIT",
    help="Which version of a hub's model; the bundle records its commit.  [default: the newest]",
)
@click.option(
    "--force-memory", is_flag=True, help="Try even where the estimate says that memory will not do."
)
def command(
    model: str,
    policy: str | None,
    budget: float,
    window: int | None,
    evict_every: int | None,
    num_recent: int | None,
    head_map: str | None,
    groups: int,
    prompt_slots: int,
    dtype: str,
    weights: str,
    kv_dtype: str,
    target: str | None,
    out: Path | None,
    force: bool,
    resume: bool,
    num_layers: int | None,
    revision: str | None,
    force_memory: bool,
) -> None:
    """Export a checkpoint to a bundle.

    A bundle is a folder of ONNX graphs with a compressed KV cache of fixed size, one copy of the
    weights, the tokenizer and a manifest; `ssd-export generate` draws from it.
    """
    options.check_budget(budget)
    options.check_prompt_slots(prompt_slots)
    if dtype not in MODEL_DTYPES:
        raise UserError(f"unknown --dtype {dtype!r}; choose one of {', '.join(MODEL_DTYPES)}")

    check_weights(weights, target)
    options.check_kv_dtype(kv_dtype)

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
        head_map=head_map,
        groups=groups,
        prompt_slots=prompt_slots,
        dtype=dtype,
        out=out,
        force=force,
        weights=weights,
        target=target,
        kv_dtype=kv_dtype,
        resume=resume,
        num_layers=num_layers,
        revision=revision,
        force_memory=force_memory,
    )
    with ProgressReport(in_bytes=("weights",)) as progress:
        path = export_bundle(spec, progress=progress, kept=_say_kept)
    try:
        remember_latest(path)
    except OSError as error:
        click.echo(
            f"not remembered as the latest bundle ({error.strerror}): name it with --bundle {path}",
            err=True,
        )
    _print_notes(path)
    _print_allocation(path)
    _print_precision(path)
    click.echo(path)


def _say_kept(folder: Path) -> None:
    click.echo(
        f"{folder} keeps what is finished: the same command with --resume goes on; delete it"
        " otherwise",
        err=True,
    )


def check_weights(weights: str, target: str | None) -> None:
    """Raises: UserError for an unknown format or target, or a target that lacks the format."""
    if weights not in WEIGHTS:
        raise UserError(f"unknown --weights {weights!r}; choose one of {', '.join(WEIGHTS)}")

    from ssd_export.tensorrt.target import fp8_targets, target_names

    if target is not None and target not in target_names():
        raise UserError(f"unknown --target {target!r}; choose one of {', '.join(target_names())}")
    if weights == "fp8" and target not in fp8_targets():
        why = f"{target} is not one" if target else "most machines have none"
        raise UserError(
            f"--weights fp8 needs a target with fp8 ({why}); use --target"
            f" {', '.join(fp8_targets())}, or --weights int8 or int4, which run everywhere"
        )


def _print_notes(path: Path) -> None:
    """What the policy chose otherwise than usual, or assumed, on stderr."""
    from ssd_export.bundle import read_config

    for note in read_config(path).policy.notes:
        click.echo(note, err=True)


def _print_precision(path: Path) -> None:
    """Where int4 could not use its usual blocks, on stderr."""
    from ssd_export.bundle import read_config
    from ssd_export.export.quantize import block_lines

    for line in block_lines(read_config(path).precision):
        click.echo(line, err=True)


def _print_allocation(path: Path) -> None:
    """What ssd-auto chose for each layer and what it is expected to lose, on stderr: stdout is the
    bundle's folder.
    """
    from ssd_export.bundle import read_config
    from ssd_export.cli.allocation_table import group_lines, predicted_lines
    from ssd_export.policy.head_map import HeadMap
    from ssd_export.policy.presets import Heads, policy_of

    config = read_config(path)
    table = config.policy
    if policy_of(table.name).heads is not Heads.ALLOCATED:
        return
    head_map = HeadMap.load(path / "head_map.json")
    for line in group_lines(table) + predicted_lines(head_map, config.model, table):
        click.echo(line, err=True)
