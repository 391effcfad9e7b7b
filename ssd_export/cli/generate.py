"""ssd-export generate: pictures from a bundle."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_export.cli import options
from ssd_export.errors import UserError

if TYPE_CHECKING:
    from ssd_export.bundle import Bundle
    from ssd_export.runtime.generate import CacheReport, ImageGenerator, RowEvent


MAX_LOOKAHEAD = 64


@dataclass(frozen=True)
class GenerateSpec:
    """What to draw and where to write it; None leaves a number to the bundle."""

    prompts: tuple[str, ...]
    seed: int
    num_images: int
    cfg_scale: float | None
    temperature: float | None
    top_k: int
    greedy: bool
    out: Path
    save_tokens: Path | None
    preview: Path | None
    batch: int
    decoder_batch: int
    lookahead: int = 1  # tokens of a pass

    @property
    def total_images(self) -> int:
        return len(self.prompts) * self.num_images


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle to draw from.  [default: the one exported last from this folder]",
)
@options.runner
@options.provider
@options.seed("Randomness of the pictures, 64 bits: the same seed draws the same on every runner.")
@click.option(
    "--num-images",
    type=int,
    default=1,
    show_default=True,
    metavar="COUNT",
    help="Pictures for each prompt.",
)
@click.option(
    "--cfg-scale",
    type=float,
    metavar="FACTOR",
    help="Strength of classifier-free guidance; 1 is none.  [default: the bundle's; Janus-Pro: 5]",
)
@click.option(
    "--temperature",
    type=float,
    metavar="FACTOR",
    help="Divides the logits before sampling, above 0.  [default: the bundle's; Janus-Pro: 1.0]",
)
@click.option(
    "--top-k",
    type=int,
    default=0,
    show_default=True,
    metavar="COUNT",
    help="Sample among the likeliest tokens only; 0 among all.",
)
@click.option(
    "--greedy",
    is_flag=True,
    help="Take the likeliest token; --temperature and --top-k then do nothing.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    metavar="FILE.png",
    help="The picture; several make a sheet here and out-000.png, out-001.png, ... beside it.",
)
@click.option(
    "--save-tokens",
    type=click.Path(path_type=Path),
    metavar="FILE.npy",
    help="Write the image tokens, int32 [pictures, image tokens].  [default: not written]",
)
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=(
        "Write the unfinished pictures after each grid row: row-00.png, ...  [default: not written]"
    ),
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="COUNT",
    help="Pictures drawn at once.",
)
@click.option(
    "--decoder-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="COUNT",
    help="Pictures decoded to pixels at once: more takes memory and saves little time.",
)
@click.option(
    "--lookahead",
    default="off",
    show_default=True,
    metavar="off|TOKENS",
    help=(
        "Tokens of an image that one pass tries: the same tokens in fewer passes, up to near ties."
        " --runner torch alone has such a pass."
    ),
)
@click.option(
    "--force-memory", is_flag=True, help="Try even where the estimate says that memory will not do."
)
def command(
    bundle: Path | None,
    runner: str,
    provider: str | None,
    prompts: tuple[str, ...],
    greedy: bool,
    seed: int,
    num_images: int,
    cfg_scale: float | None,
    temperature: float | None,
    top_k: int,
    out: Path,
    save_tokens: Path | None,
    preview: Path | None,
    batch: int,
    decoder_batch: int,
    lookahead: str,
    force_memory: bool,
) -> None:
    """Draw a picture for each PROMPT.

    From a bundle that `ssd-export export` wrote. The PNG carries what it was made from as text
    chunks.
    """
    spec = GenerateSpec(
        prompts,
        seed,
        num_images,
        cfg_scale,
        temperature,
        top_k,
        greedy,
        out,
        save_tokens,
        preview,
        batch,
        decoder_batch,
        _lookahead_of(lookahead),
    )
    _check_numbers(spec)
    _check_places(spec)

    from ssd_export.bundle import resolve_bundle
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.runners import find_runner

    def check(opened: Bundle) -> None:
        kind = find_runner(runner)
        if kind.memory_is_known and kind.provider(provider) == "cpu" and not force_memory:
            check_memory(opened, min(batch, spec.total_images), decoder_batch)

    path = resolve_bundle(bundle)
    with ImageGenerator.from_bundle(
        path, runner=runner, provider=provider, check=check
    ) as generator:
        began = time.perf_counter()
        event = _draw(generator, spec)
        seconds = time.perf_counter() - began
        paths = _write(generator, spec, event)
        click.echo(
            f"{paths[0]}: {_pictures(spec.total_images)} in {seconds:.2f} s, policy"
            f" {generator.table.name}, budget {generator.table.budget:g}"
        )
        if generator.cache is not None:
            click.echo(_cache_line(generator.cache))


def _check_numbers(spec: GenerateSpec) -> None:
    if not 0 <= spec.seed < 1 << 64:
        raise UserError(f"--seed {spec.seed} is outside 0 .. 2**64 - 1; use a number such as 0")
    if spec.num_images < 1:
        raise UserError(f"--num-images {spec.num_images} draws nothing; use 1 or more")
    if spec.cfg_scale is not None and not (math.isfinite(spec.cfg_scale) and spec.cfg_scale >= 0):
        raise UserError(
            f"--cfg-scale {spec.cfg_scale:g} is no strength; use 5, or 1 for no guidance"
        )
    if spec.temperature is not None and not (
        math.isfinite(spec.temperature) and spec.temperature > 0
    ):
        raise UserError(
            f"--temperature {spec.temperature:g} is not above 0; use 1.0, or --greedy for the"
            " likeliest token"
        )
    if spec.top_k < 0:
        raise UserError(f"--top-k {spec.top_k} is below 0; use 0 to sample among all tokens")


def _lookahead_of(text: str) -> int:
    """Tokens of a pass: 1 where it is off. Raises: UserError."""
    if text == "off":
        return 1
    if text not in map(str, range(2, MAX_LOOKAHEAD + 1)):
        raise UserError(f"--lookahead {text[:40]} is neither off nor 2 .. {MAX_LOOKAHEAD}; use 16")
    return int(text)


def check_memory(bundle: Bundle, num_images: int, decoder_batch: int) -> None:
    """Raises: UserError where drawing that many pictures at once on this CPU takes more memory than
    is free.
    """
    from ssd_export.dtypes import DTYPES
    from ssd_export.machine import total_bytes
    from ssd_export.plan.memory import check_fits, drawing_bytes
    from ssd_export.plan.sizes import WeightSizes

    config, dtype = bundle.config.model, bundle.config.dtype
    table = bundle.config.policy
    cache = table.cache_bytes(config, DTYPES[dtype].num_bytes, config.rows_per_image * num_images)
    needed = drawing_bytes(
        config, WeightSizes.of_bundle(bundle), dtype, cache, decoder_batch, total_bytes()
    )
    ways_out = [f"draw fewer at once with --batch {max(1, num_images // 2)}"] * (num_images > 1)
    check_fits(
        "drawing",
        needed,
        (*ways_out, "export with --weights int4", "export with a smaller --budget"),
    )


def _check_places(spec: GenerateSpec) -> None:
    """Everything that will be written can be: found out before the work."""
    from ssd_export.files import check_file, make_folder
    from ssd_export.runtime.pictures import check_pictures

    check_pictures(spec.out, spec.total_images)
    if spec.save_tokens is not None:
        check_file(spec.save_tokens)
    if spec.preview is not None:
        make_folder(spec.preview)


def _draw(generator: ImageGenerator, spec: GenerateSpec) -> RowEvent:
    """The last event; previews are written on the way."""
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.runtime.pictures import contact_sheet, write_png

    max_batch = min(spec.batch, generator.runner.max_images)
    total = generator.config.grid.height * math.ceil(spec.total_images / max_batch)
    events = generator.stream(
        spec.prompts,
        seed=spec.seed,
        num_images=spec.num_images,
        cfg_scale=spec.cfg_scale,
        temperature=0.0 if spec.greedy else spec.temperature,
        top_k=0 if spec.greedy else spec.top_k,
        preview=spec.preview is not None,
        max_batch=max_batch,
        decoder_batch=spec.decoder_batch,
        lookahead=spec.lookahead,
    )
    with ProgressReport() as progress:
        for count, event in enumerate(events):
            progress(f"drawing {_pictures(spec.total_images)}", count + 1, total)
            if spec.preview is not None and event.images is not None:
                write_png(spec.preview / f"row-{count:02d}.png", contact_sheet(event.images), {})
    return event


def _write(generator: ImageGenerator, spec: GenerateSpec, event: RowEvent) -> list[Path]:
    """Writes tokens and pictures; the pictures' paths, the sheet first."""
    import numpy as np

    from ssd_export.files import write_file
    from ssd_export.runtime.pictures import write_pictures
    from ssd_export.version import TOOL_VERSION

    defaults = generator.bundle.config.generation
    cfg_scale = defaults.cfg_scale if spec.cfg_scale is None else spec.cfg_scale
    temperature = defaults.temperature if spec.temperature is None else spec.temperature
    shared = {
        "seed": str(spec.seed),
        "policy": generator.table.name,
        "budget": f"{generator.table.budget:g}",
        "bundle_hash": generator.bundle.hash,
        "tool_version": TOOL_VERSION,
        "cfg_scale": f"{cfg_scale:g}",
        "temperature": "greedy" if spec.greedy else f"{temperature:g}",
        "top_k": str(spec.top_k),
        "num_images": str(spec.num_images),
    }
    every = [prompt for prompt in spec.prompts for _ in range(spec.num_images)]
    texts = [
        {"prompt": prompt, "image": str(index), **shared} for index, prompt in enumerate(every)
    ]
    if spec.save_tokens is not None:
        write_file(spec.save_tokens, lambda file: np.save(file, event.tokens))
    return write_pictures(
        spec.out, event.images or [], texts, {"prompt": "\n".join(spec.prompts), **shared}
    )


def _cache_line(cache: CacheReport) -> str:
    return (
        f"KV cache: {cache.bytes_per_image:,} bytes an image as allocated; its image slots "
        f"{cache.image_share:.3f} of a full cache; {cache.tokens_dropped:,} tokens dropped"
    )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
