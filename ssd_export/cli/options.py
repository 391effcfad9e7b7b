"""The options that several verbs take, each declared once, and what is checked of them before any
work.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import click

from ssd_export.cli.verb import Argument, option
from ssd_export.dtypes import MODEL_DTYPES
from ssd_export.errors import UserError
from ssd_export.policy.presets import DEFAULT_GROUPS, MAX_GROUPS
from ssd_export.policy.table import FULL, MAX_LOOKAHEAD
from ssd_export.runtime.runners import DEFAULT, KINDS, NAMES, check_threads, find_runner
from ssd_export.sampling import MAX_IMAGES, Sampling, as_count, as_seed, rows_start

WEIGHTS = ("none", "int8", "int4", "fp8")
MAX_BATCH = 4096  # images at once: more fills no GPU better, and is a slip of the keyboard
FILE = click.Path(path_type=Path)
LATEST = "[default: the one exported last from this folder]"
PROVIDERS = tuple(dict.fromkeys(provider for kind in KINDS for provider in kind.providers))

# What is generated from

model = option(
    "--model",
    default="demo",
    metavar="demo|demo-classes|DIR|HUB_ID",
    help=(
        "The checkpoint: a built-in demo, of captions or of classes, a folder (any published"
        " layout), or a model hub's owner/name."
    ),
)
lora = option(
    "--lora",
    type=FILE,
    metavar="DIR",
    help=(
        "A LoRA adapter as PEFT saves it (adapter_config.json, adapter_model.safetensors), merged"
        " into the model's matrices on the way.  [default: none]"
    ),
)
prompt_template = option(
    "--prompt-template",
    metavar="NAME",
    help=(
        "How prompts are written: janus-pro (<|User|>: ...) or janus (User: ..., as Janus-1.3B was"
        " trained).  [default: what the model's files tell]"
    ),
)
bundle = option("--bundle", type=FILE, metavar="DIR", help=f"The bundle.  {LATEST}")
prompts_or_file = Argument(("prompts",), {"nargs": -1, "metavar": "[PROMPT...]"})
prompt_file = option(
    "--prompts",
    "prompt_file",
    type=FILE,
    metavar="FILE",
    help=(
        "File of prompts: .txt (one a line), .csv or .jsonl, whose lines may have a class in"
        " place of the prompt and set negative_prompt, seed, cfg_scale, temperature and top_k."
        " --out is then a folder of images and results.jsonl, and the same command continues an"
        " interrupted run."
        "  [default: none]"
    ),
)
ray = option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help=(
        "Generate the images of --prompts on a Ray cluster; without an address, on this "
        "machine. Each worker takes --threads CPUs (1 by default) and, with --provider "
        "cuda, a GPU.  [default: no]"
    ),
)
ray_workers = option(
    "--ray-workers",
    type=click.IntRange(min=1),
    metavar="COUNT",
    help="Workers, each with its own generator.  [default: what the cluster has room for]",
)
classes = option(
    "--class",
    "classes",
    multiple=True,
    metavar="NUMBER|NAME",
    help="Class to generate, for a model of classes; repeat it for several.  [default: none]",
)
prompt_embeds = option(
    "--prompt-embeds",
    type=FILE,
    metavar="FILE.safetensors",
    help=(
        "Prompts as a text encoder embedded them, for a model that reads embeddings: "
        "prompt_embeds [N, T, width] and attention_mask [N, T].  [default: none]"
    ),
)
prompts = Argument(("prompts",), {"nargs": -1, "required": True, "metavar": "PROMPT..."})

# Backend

runner = option(
    "--runner",
    default=DEFAULT,
    metavar="|".join(NAMES),
    help=f"Backend: {', '.join(f'{kind.title} ({kind.name})' for kind in KINDS)}.",
)
provider = option(
    "--provider",
    metavar="|".join(PROVIDERS),
    help=f"Device that the runner computes on.  [default: {KINDS[0].provider()}; trt: cuda]",
)
threads = option(
    "--threads",
    type=int,
    metavar="COUNT",
    help="CPU threads.  [default: all that this process may use, 1 for small models]",
)
batch = option(
    "--batch",
    type=int,
    metavar="COUNT",
    help=(
        "Images generated at once; the images do not depend on it.  [default: 64, for "
        "large models 16]"
    ),
)
decoder_batch = option(
    "--decoder-batch",
    type=int,
    default=1,
    metavar="COUNT",
    help="Images decoded to pixels at once; more take memory and save little time.",
)
lookahead = option(
    "--lookahead",
    default="off",
    metavar="auto|off|TOKENS|zipar:S",
    help=(
        "Tokens of an image that one pass tries: the same tokens in fewer passes, up to near ties."
        " With --runner trt it needs engines that were built for it. auto chooses, for one image at"
        " a time, where that is expected to be faster. zipar:S begins a grid row when the row"
        " above has S tokens, which is not lossless: fewer passes, other images; full caches only."
    ),
)
force_memory = option(
    "--force-memory", is_flag=True, help="Go on even where the estimate exceeds the memory."
)

# How tokens are drawn

seed = option("--seed", type=int, default=0, metavar="INTEGER", help="Random seed of the images.")
negative_prompt = option(
    "--negative-prompt",
    default="",
    metavar="TEXT",
    show_default=False,
    help=("Prompt that guidance leads away from.  [default: the model's own unconditional row]"),
)
num_images = option(
    "--num-images", type=int, default=1, metavar="COUNT", help="Images for each prompt."
)
cfg_scale = option(
    "--cfg-scale",
    type=float,
    metavar="FACTOR",
    help="Strength of guidance; 1 is none.  [default: the model's]",
)
temperature = option(
    "--temperature", type=float, metavar="FACTOR", help="0 is greedy.  [default: the model's]"
)
top_k = option(
    "--top-k",
    type=int,
    default=0,
    metavar="COUNT",
    help="Sample among the likeliest tokens only; 0 among all.",
)
greedy = option(
    "--greedy",
    is_flag=True,
    help="Take the likeliest token; --temperature and --top-k have no effect.",
)
num_prompts = option(
    "--num-prompts",
    type=int,
    default=300,
    metavar="COUNT",
    help="Captions, drawn evenly over the four categories from those unseen in training.",
)

# What an export is made of

policy = option(
    "--policy", metavar="NAME", help="As for export.  [default: the one export would take]"
)
BUDGET = 0.2
budget = option(
    "--budget", type=float, metavar="SHARE", help=f"As for export.  [default: {BUDGET}]"
)
head_map = option(
    "--head-map",
    metavar="FILE|NAME|random:SEED|swapped",
    help=(
        "Head types and costs from `ssd-export calibrate`, a built-in map (janus-pro-1b, "
        "janus-pro-7b), or a control of the model's own map: its head types permuted at "
        "random, or swapped.  [default: the model's own map]"
    ),
)
groups = option(
    "--groups",
    type=click.IntRange(1, MAX_GROUPS),
    default=DEFAULT_GROUPS,
    metavar="1|2|3",
    help="Most head groups, each with its rule and size, that ssd-auto uses in a layer.",
)
prompt_slots = option(
    "--prompt-slots",
    type=int,
    metavar="TOKENS",
    help=(
        "Cache slots for the prompt, control tokens included: as many as the longest "
        "prompt needs. Slots that a short prompt leaves free hold image tokens, so "
        "calibrate with the number that you export with.  [default: the model's; "
        "Janus-Pro: 64]"
    ),
)
dtype = option(
    "--dtype",
    default="fp32",
    metavar="|".join(MODEL_DTYPES),
    help="Precision of weights and cache.",
)
weights = option(
    "--weights",
    metavar="|".join(WEIGHTS),
    help="Storage of the layers' matrices.  [default: none]",
)
head_weights = option(
    "--head-weights",
    metavar="|".join(WEIGHTS),
    help=(
        "Storage of the matrices of the generation head and the aligner.  [default: int8 "
        "where --weights is int8 or int4, else none]"
    ),
)
kv_dtype = option(
    "--kv-dtype",
    metavar="model|int8",
    help="Storage of the cache's keys and values.  [default: model]",
)
num_layers = option(
    "--num-layers",
    type=int,
    metavar="COUNT",
    help="Export only the first layers: a quick trial of a big model.  [default: all]",
)
target = option("--target", metavar="NAME", help="What will run it, as for build-engine.")

# What is written

out = option("--out", type=FILE, metavar="DIR")
save_tokens = option(
    "--save-tokens",
    type=FILE,
    metavar="FILE.npy",
    help="Write the image tokens, int32 [images, tokens].  [default: not written]",
)
preview = option(
    "--preview",
    type=FILE,
    metavar="DIR",
    help=(
        "Write the unfinished images after each grid row as row-00.png, ...; replaces "
        "earlier previews.  [default: not written]"
    ),
)
as_json = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")


def check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    """Raises UserError for a value that is not among the choices."""
    if value not in choices:
        raise UserError(f"unknown {flag} {value!r}; choose one of {', '.join(choices)}")


def check_runner(name: str, provider: str | None, threads: int | None) -> None:
    """Raises UserError for what no runner has, or a number of threads that cannot help."""
    find_runner(name).provider(provider)
    check_threads(threads, "--threads")


def check_sampling(
    cfg_scale: float | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    greedy: bool = True,
) -> None:
    """Raises UserError for numbers that cannot be sampled with. greedy: temperature 0 is
    allowed.
    """
    if temperature == 0 and not greedy:
        raise UserError(
            "--temperature 0 is not above 0; use 1.0, or --greedy for the likeliest token"
        )
    try:
        Sampling().changed(cfg_scale, temperature, top_k)
    except UserError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def check_seed(value: int) -> None:
    """Raises UserError for what is no unsigned 64-bit number."""
    as_seed(value, "--seed")


def check_batch(value: int | None, flag: str = "--batch") -> None:
    """Raises UserError for a number of images at once that is none, or absurd."""
    if value is not None:
        as_count(value, flag, way_out=f"use 1 to {MAX_BATCH}", most=MAX_BATCH)


def check_num_prompts(value: int, least: int = 1) -> None:
    """Raises UserError for a number of captions that scores nothing, or is never done."""
    way_out = "use 300" if least else "use 300, or 0 for the teacher-forced loss alone"
    as_count(value, "--num-prompts", least, way_out, MAX_IMAGES)


def budget_of(asked: float | None, policy: str | None) -> float:
    """The budget asked for, 0.2 where none is. Raises: UserError for one that is no share, or that
    the policy would not keep to.
    """
    value = BUDGET if asked is None else asked
    check_budget(value)
    if policy == FULL and asked not in (None, 1):
        raise UserError(
            f"--policy {FULL} keeps everything, and --budget {value:g} would have no effect; leave"
            " it out, or choose another policy"
        )
    return value


def check_budget(value: float) -> None:
    """Raises UserError for a budget that is no share."""
    if not 0 < value <= 1:
        raise UserError(
            f"--budget {value:g} is outside (0, 1]; use 0.2 to keep a fifth of the image tokens"
        )


def check_prompt_slots(value: int | None) -> None:
    """Raises UserError for fewer than one prompt slot."""
    if value is not None and value < 1:
        raise UserError(
            f"--prompt-slots {value} holds no prompt; use 64, or what your longest prompt needs"
        )


def check_kv_dtype(value: str) -> None:
    """Raises UserError for an unknown cache format."""
    from ssd_export.policy.table import check_kv_dtype as check

    check(value)


def check_weights(weights: str, head_weights: str | None, target: str | None) -> None:
    """Raises UserError for an unknown format or target, or a target that lacks the format."""
    check_choice("--weights", weights, WEIGHTS)
    check_choice("--head-weights", head_weights or "none", WEIGHTS)

    from ssd_export.tensorrt.target import fp8_targets, target_names

    if target is not None:
        check_choice("--target", target, target_names())
    if "fp8" in (weights, head_weights) and target not in fp8_targets():
        why = f"{target} is not one" if target else "most machines have none"
        name = "--weights" if weights == "fp8" else "--head-weights"
        raise UserError(
            f"{name} fp8 needs a target with fp8 ({why}); use --target"
            f" {', '.join(fp8_targets())}, or {name} int8 or int4, which run everywhere"
        )


def lookahead_of(text: str) -> int | str:
    """Tokens of a pass: 1 where it is off, or auto, or zipar:S. Raises: UserError."""
    if text == "auto" or rows_start(text) is not None:
        return text
    if text == "off":
        return 1
    if text not in map(str, range(2, MAX_LOOKAHEAD + 1)):
        what = f"neither auto, off, zipar:S nor 2 .. {MAX_LOOKAHEAD}"
        raise UserError(f"--lookahead {text[:40]} is {what}; use auto")
    return int(text)


def window_of(text: str, verb: str) -> int | None:
    """Tokens of a pass that a verb prepares for: 1 where there is none, None for auto. Raises:
    UserError.
    """
    mode = None if text == "auto" else lookahead_of(text)
    if isinstance(mode, str):
        raise UserError(f"{verb} has no --lookahead {mode}; use auto, off or 16")
    return mode


def lossless_lookahead_of(text: str) -> int | str:
    """lookahead_of for images that do not say how they were decoded. Raises: UserError."""
    mode = lookahead_of(text)
    if rows_start(mode) is not None:
        raise UserError(
            f"--lookahead {mode} is not lossless: it goes with `generate PROMPT`, which writes it"
            " into the image; use auto, which has the same tokens as off"
        )
    return mode


def lookahead_modes(text: str) -> tuple[int | str, ...]:
    """The modes of a list beside off, each once. Raises: UserError."""
    modes = (lookahead_of(mode.strip()) for mode in text.split(",") if mode.strip())
    return tuple(dict.fromkeys(mode for mode in modes if mode != 1))
