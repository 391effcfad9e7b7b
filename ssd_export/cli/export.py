"""ssd-export export: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssd_export.bundle.config import DECODER_WEIGHTS, LEAST_DECODER_PSNR
from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.dtypes import MODEL_DTYPES
from ssd_export.errors import UserError
from ssd_export.policy.presets import POLICIES, default_policy
from ssd_export.runtime.runners import check_threads


@verb(
    options.model,
    options.lora,
    options.prompt_template,
    options.policy.but(
        help=(
            f"Which tokens each head keeps: {', '.join(POLICIES)}.  [default:"
            f" {default_policy(True, False)} where the model's head map has costs, else"
            f" {default_policy(False, False)}]"
        )
    ),
    options.budget.but(
        help=(
            "Mean number of cache slots for image tokens, as a share of all image tokens: above 0,"
            f" at most 1.  [default: {options.BUDGET}]"
        ),
    ),
    option(
        "--window",
        type=int,
        metavar="SLOTS",
        help=(
            "Image-token slots of a spatial head.  [default: two grid rows and two thirds, less"
            " where the budget is small]"
        ),
    ),
    option(
        "--evict-every",
        type=int,
        metavar="TOKENS",
        help=(
            "Tokens between two evictions of a head that ranks by score.  [default: the policy's,"
            " mostly a grid row]"
        ),
    ),
    option(
        "--num-recent",
        type=int,
        metavar="TOKENS",
        help=(
            "Newest tokens that a head ranking by score always keeps.  [default: the policy's,"
            " mostly half]"
        ),
    ),
    options.lookahead.but(
        default="auto",
        metavar="auto|off|TOKENS",
        help=(
            "Let all heads evict before the same steps, so many tokens apart or a multiple: passes"
            " of `generate --lookahead` are then seldom cut short. Heads' sizes change for it, and"
            " with them the images; the budget is kept. auto: ssd-auto takes a third of a grid row,"
            " or a sixth, where the head map predicts at most twice the loss, ssd-row where heads"
            " have four grid rows of slots; off: each head evicts as suits it."
        ),
    ),
    options.head_map,
    options.groups,
    options.prompt_slots,
    options.dtype,
    options.weights.but(
        default="none",
        help=(
            "Store the layers' matrices in fewer bits: int8 by output channel, int4 in blocks of"
            " 128 inputs, fp8 by output channel for a --target that has it. What is not quantized"
            " keeps --dtype."
        ),
    ),
    options.head_weights,
    option(
        "--decoder-weights",
        default="none",
        metavar="|".join(DECODER_WEIGHTS),
        help=(
            "int8 adds a second image decoder, which ONNX Runtime uses on a CPU: more than twice as"
            f" fast at Janus-Pro's size, {LEAST_DECODER_PSNR:g} dB or more from the other's pixels,"
            " or the export is refused. Tokens do not change."
        ),
    ),
    option(
        "--decoder-samples",
        type=options.FILE,
        metavar="FILE.npy",
        help=(
            "Images of the model to calibrate the int8 decoder with, as `generate --save-tokens`"
            " writes them, 20 or more; a quarter is held out to measure with.  [default: none]"
        ),
    ),
    options.kv_dtype.but(
        default="model",
        help=(
            "Keys and values of the cache: as --dtype, or int8 with a scale for every token and"
            " head, which takes less memory; on a CPU it takes less time with the operators of"
            " engines/operators, and more without."
        ),
    ),
    options.target.but(
        help=(
            "Hardware that will run the bundle, as for build-engine; what it cannot run is "
            "refused.  [default: anything]"
        )
    ),
    options.out.but(
        help=(
            "The bundle's folder.  [default:"
            " bundles/<model>-<policy>-b<budget>-<dtype>[-<weights>][-kv-<kv-dtype>]"
            "[-lookahead<tokens>|-no-lookahead]]"
        )
    ),
    option(
        "--force",
        is_flag=True,
        help="Replace an existing bundle, once the new one is complete.",
    ),
    option(
        "--resume",
        is_flag=True,
        help=(
            "Continue the same export where Ctrl-C, a signal, a crash or a full disk stopped "
            "it; begin where there is nothing to continue."
        ),
    ),
    options.num_layers,
    option(
        "--revision",
        metavar="BRANCH|TAG|COMMIT",
        help=("Version of a hub's model; the bundle records the commit.  [default: the newest]"),
    ),
    options.threads,
    options.force_memory,
    needs=("export",),
)
def command(threads: int | None, **asked: Any) -> None:
    """Export a checkpoint to a bundle.

    A bundle is a folder of ONNX graphs with a compressed KV cache of fixed size, one copy of the
    weights, the tokenizer and a manifest; `ssd-export generate` makes images from it.
    """
    asked["budget"] = options.budget_of(asked["budget"], asked["policy"])
    options.check_prompt_slots(asked["prompt_slots"])
    options.check_choice("--dtype", asked["dtype"], MODEL_DTYPES)
    options.check_weights(asked["weights"], asked["head_weights"], asked["target"])
    options.check_kv_dtype(asked["kv_dtype"])
    options.check_choice("--decoder-weights", asked["decoder_weights"], DECODER_WEIGHTS)
    if asked["decoder_samples"] is not None and asked["decoder_weights"] == "none":
        raise UserError("--decoder-samples calibrates the int8 decoder; add --decoder-weights int8")
    check_threads(threads, "--threads")

    from ssd_export.bundle import remember_latest
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.export.exporter import ExportSpec, export_bundle
    from ssd_export.model.torch_threads import set_torch_threads

    set_torch_threads(threads)
    asked["lookahead"] = options.window_of(asked["lookahead"], "export")
    spec = ExportSpec(**asked)
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


def _print_notes(path: Path) -> None:
    """Prints to stderr what the policy assumed or chose otherwise than usual."""
    from ssd_export.bundle import read_config

    for note in read_config(path).policy.notes:
        click.echo(note, err=True)


def _print_precision(path: Path) -> None:
    """Prints to stderr where int4 could not use its usual blocks, and what int8 does to pixels."""
    from ssd_export.bundle import read_config
    from ssd_export.bundle.config import decoder_line
    from ssd_export.export.quantize import block_lines

    config = read_config(path)
    for line in block_lines(config.precision):
        click.echo(line, err=True)
    if config.int8_decoder is not None:
        click.echo(decoder_line(config.int8_decoder), err=True)


def _print_allocation(path: Path) -> None:
    """Prints to stderr the choice of ssd-auto by layer and its expected loss; stdout is for the
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
