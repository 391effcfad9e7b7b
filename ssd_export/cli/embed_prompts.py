"""ssd-export embed-prompts: prompts as a text encoder embeds them, for models that read those."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError
from ssd_export.runtime.runners import check_threads

if TYPE_CHECKING:
    from ssd_export.config import ModelConfig
    from ssd_export.model.text_encoder import Wanted

DTYPES = ("fp32", "bf16")  # T5's activations are beyond fp16


@dataclass(frozen=True)
class EmbedSpec:
    """Options of embed-prompts; without model and bundle, for the published LlamaGen."""

    prompts: tuple[str, ...]
    prompt_file: Path | None
    encoder: Path
    model: str | None
    bundle: Path | None
    keep_text: bool
    dtype: str
    device: str
    threads: int | None
    out: Path


@verb(
    options.prompts_or_file,
    options.prompt_file.but(help="File of prompts: UTF-8 text, one a line.  [default: none]"),
    option(
        "--encoder",
        type=options.FILE,
        required=True,
        metavar="DIR",
        help="The encoder: a folder with config.json, tokenizer.json and *.safetensors.",
    ),
    options.model.but(
        default=None,
        metavar="DIR|HUB_ID",
        help="The checkpoint that will read the embeddings.  [default: published LlamaGen]",
    ),
    options.bundle.but(
        help="The bundle that will read the embeddings, in place of --model.  [default: none]"
    ),
    option(
        "--keep-text",
        is_flag=True,
        help=(
            "Embed each prompt as it is typed. Otherwise it is cleaned as the captions of"
            " LlamaGen's training: lower case, plain quotes and dashes, no symbols."
        ),
    ),
    option("--dtype", default="fp32", metavar="|".join(DTYPES), help="Dtype of the encoder."),
    option("--device", default="cpu", metavar="cpu|cuda", help="Where the encoder computes."),
    options.threads.but(help="CPU threads.  [default: all that this process may use]"),
    options.out.but(
        default=Path("prompts.safetensors"),
        metavar="FILE.safetensors",
        help="The file that --prompt-embeds reads.",
    ),
    needs=("embed",),
)
def command(**asked: Any) -> None:
    """Embed each PROMPT with the T5 encoder of a text-conditional model.

    The file holds prompt_embeds, zero on the left of each prompt, and attention_mask; prompts,
    encoder and version stand in its header.
    """
    spec = EmbedSpec(**asked)
    if bool(spec.prompts) == (spec.prompt_file is not None):
        raise click.UsageError("give each PROMPT here, or all of them with --prompts FILE")
    if spec.model is not None and spec.bundle is not None:
        raise UserError("--model and --bundle say the same thing; give one of them")
    options.check_choice("--dtype", spec.dtype, DTYPES)
    options.check_choice("--device", spec.device, ("cpu", "cuda"))
    check_threads(spec.threads, "--threads")
    _embed(spec)


def _embed(spec: EmbedSpec) -> None:
    from ssd_export.calibrate.prompts import read_prompts
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.dtypes import MODEL_DTYPES
    from ssd_export.files import check_file, write_file
    from ssd_export.model.prompt_embeds import MAX_FILE_BYTES
    from ssd_export.model.text_encoder import TextEncoder, clean_prompt
    from ssd_export.model.torch_threads import set_torch_threads

    check_file(spec.out)
    set_torch_threads(spec.threads)
    typed = spec.prompts if spec.prompt_file is None else read_prompts(spec.prompt_file)
    texts = typed if spec.keep_text else tuple(map(clean_prompt, typed))
    wanted = _wanted(spec)
    most = MAX_FILE_BYTES // (5 * wanted.width * wanted.num_tokens)
    if len(texts) > most:
        raise UserError(f"{len(texts)} prompts, and a file holds {most}: embed them in parts")
    encoder = TextEncoder(spec.encoder, wanted, MODEL_DTYPES[spec.dtype].name, spec.device)
    with ProgressReport() as progress:
        arrays = encoder.embed_all(texts, progress)
    content = _content(spec, texts, arrays)
    write_file(spec.out, lambda file: file.write(content))
    most = int(arrays["attention_mask"].sum(axis=1).max())
    click.echo(
        f"{spec.out}: {len(texts)} prompts, at most {most} tokens of {wanted.num_tokens}, width"
        f" {wanted.width}"
    )


def _content(spec: EmbedSpec, texts: tuple[str, ...], arrays: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    from ssd_export.bundle.hashes import sha256
    from ssd_export.model.text_encoder import CONFIG, TOKENIZER
    from ssd_export.version import TOOL_VERSION

    made_by = {
        "encoder": spec.encoder.resolve().name,
        "encoder_config": sha256(spec.encoder / CONFIG),
        "tokenizer": sha256(spec.encoder / TOKENIZER),
        "dtype": spec.dtype,
        "prompts": json.dumps(texts, ensure_ascii=False),
        "tool_version": TOOL_VERSION,
    }
    content: bytes = save(arrays, metadata=made_by)
    return content


def _wanted(spec: EmbedSpec) -> Wanted:
    """The width and number of tokens that the model reads."""
    from ssd_export.model.families import PUBLISHED
    from ssd_export.model.text_encoder import Wanted

    config = _config(spec) or PUBLISHED["llamagen-t2i-xl-256"]
    if not config.caption_dim:
        raise UserError(
            f"{spec.model or spec.bundle} reads no embeddings: give its prompts as text or classes"
        )
    return Wanted(config.caption_dim, config.vocab_size)


def _config(spec: EmbedSpec) -> ModelConfig | None:
    if spec.bundle is not None:
        from ssd_export.bundle import read_config

        return read_config(spec.bundle).model
    if spec.model is None:
        return None
    from ssd_export.model.checkpoint import open_checkpoint
    from ssd_export.model.find import model_folder

    return open_checkpoint(model_folder(spec.model)[1]).config
