"""Options that several verbs take, and what is checked of them, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ssd_export.errors import UserError

model = click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="demo|DIR|HUB_ID",
    help=(
        "The checkpoint: the built-in demo, a folder (either layout), or a model hub's owner/name."
    ),
)
head_map = click.option(
    "--head-map",
    metavar="FILE|NAME|random:SEED|swapped",
    help=(
        "Head kinds and costs from `ssd-export calibrate`, a built-in map (janus-pro-1b,"
        " janus-pro-7b), or a control of the model's own map: its head types permuted at random,"
        " or swapped.  [default: the model's own map]"
    ),
)
prompt_slots = click.option(
    "--prompt-slots",
    type=int,
    default=64,
    show_default=True,
    metavar="TOKENS",
    help=(
        "Cache slots for the prompt: the longest prompt, control tokens included. What a short"
        " prompt leaves free holds image tokens, so calibrate and export want the same number."
    ),
)
runner = click.option(
    "--runner",
    default="ort",
    show_default=True,
    metavar="ort|torch|trt",
    help="Who computes: ONNX Runtime, torch or TensorRT.",
)
provider = click.option(
    "--provider",
    metavar="cpu|cuda",
    help="Where the runner computes.  [default: cpu; trt: cuda]",
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="COUNT",
    help="Threads of the CPU.  [default: as the model's size and the machine allow]",
)
batch = click.option(
    "--batch",
    type=int,
    metavar="COUNT",
    help=(
        "Pictures drawn at once; which ones are drawn does not depend on it.  [default: 64, for"
        " large models 16]"
    ),
)
cfg_scale = click.option(
    "--cfg-scale",
    type=float,
    metavar="FACTOR",
    help="Strength of guidance; 1 is none.  [default: the model's]",
)
temperature = click.option(
    "--temperature", type=float, metavar="FACTOR", help="0 is greedy.  [default: the model's]"
)


def seed(help: str) -> Callable[[Any], Any]:
    return click.option(
        "--seed", type=int, default=0, show_default=True, metavar="INTEGER", help=help
    )


def check_kv_dtype(value: str) -> None:
    from ssd_export.policy.table import check_kv_dtype as check

    check(value)


def check_seed(value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise UserError(f"--seed {value} is outside 0 .. 2**64 - 1; use a number such as 0")


def check_budget(value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(
            f"--budget {value:g} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens"
        )


def check_prompt_slots(value: int) -> None:
    if value < 1:
        raise UserError(
            f"--prompt-slots {value} holds no prompt; use 64, or what your longest prompt needs"
        )
