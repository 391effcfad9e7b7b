"""ssd-export prompts: token ids of prompts, for programs that have no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.cli.verb import verb


@dataclass(frozen=True)
class PromptIds:
    """A prompt as typed and its conditional row: control tokens, text, control tokens."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptFile:
    """Rows of a prompt file. prompt_slots: the longest row that the bundle's cache holds."""

    bundle_hash: str
    prompt_slots: int
    prompts: tuple[PromptIds, ...]


@verb(
    options.prompts,
    options.bundle.but(help=f"The bundle whose tokenizer is used.  {options.LATEST}"),
    options.out.but(default=Path("prompts.json"), metavar="FILE.json", help="Where the ids go."),
)
def command(prompts: tuple[str, ...], bundle: Path | None, out: Path) -> None:
    """Write the token ids of each PROMPT, control tokens included.

    A C or C++ program gives them to ssd_runtime in place of text, where the library was built
    without a tokenizer.
    """
    from ssd_export.bundle import open_bundle, resolve_bundle
    from ssd_export.files import check_file, write_file
    from ssd_export.model.families import prompt_encoder
    from ssd_export.typed_json import to_json

    check_file(out)
    opened = open_bundle(resolve_bundle(bundle))
    encoder = prompt_encoder(opened.config.model, opened.file)
    slots = opened.config.policy.prompt_slots
    encoded = encoder.encode(prompts, slots)
    rows = zip(prompts, encoded.ids, encoded.prompt_length)  # the conditional rows come first
    made = tuple(PromptIds(text, tuple(ids[:length].tolist())) for text, ids, length in rows)
    content = to_json(PromptFile(opened.hash, slots, made)).encode()
    write_file(out, lambda file: file.write(content))
    click.echo(
        f"{out}: {len(made)} prompts, at most {max(len(m.ids) for m in made)} tokens of {slots}"
    )
