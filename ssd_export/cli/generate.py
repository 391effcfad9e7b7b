"""ssd-export generate: images from a bundle."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import verb
from ssd_export.errors import UserError
from ssd_export.sampling import MAX_IMAGES, Sampling, as_count, rows_start

if TYPE_CHECKING:
    from ssd_export.bundle import Bundle, BundleConfig
    from ssd_export.model.prompt import Prompt
    from ssd_export.runtime.cache_report import CacheReport
    from ssd_export.runtime.generate import ImageGenerator, RowEvent
    from ssd_export.runtime.images import ImageWriter
    from ssd_export.runtime.runners import RunnerKind

PREVIEW_NAME = re.compile(r"row-\d{2,}\.png")


@dataclass(frozen=True)
class GenerateSpec:
    """Options of generate; None leaves a number to the bundle or the runner."""

    prompts: tuple[Prompt, ...]
    classes: tuple[str, ...]  # numbers or names
    prompt_embeds: Path | None
    prompt_file: Path | None
    ray: str | None  # an address, "" for a cluster on this machine
    ray_workers: int | None
    negative_prompt: str
    bundle: Path | None
    runner: str
    provider: str | None
    threads: int | None
    seed: int
    num_images: int
    cfg_scale: float | None
    temperature: float | None
    top_k: int
    greedy: bool
    out: Path | None
    save_tokens: Path | None
    preview: Path | None
    batch: int
    decoder_batch: int
    lookahead: str  # auto, off, or tokens of a pass
    force_memory: bool

    @property
    def total_images(self) -> int:
        """Images over all prompts."""
        return len(self.prompts) * self.num_images

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of ImageGenerator.stream that decide tokens."""
        return {
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "num_images": self.num_images,
            "cfg_scale": self.cfg_scale,
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": 0 if self.greedy else self.top_k,
            "lookahead": options.lookahead_of(self.lookahead),
        }


@verb(
    options.prompts_or_file,
    options.classes,
    options.prompt_embeds,
    options.prompt_file,
    options.ray,
    options.ray_workers,
    options.negative_prompt,
    options.bundle.but(help=f"The bundle to generate from.  {options.LATEST}"),
    options.runner,
    options.provider,
    options.threads,
    options.seed.but(
        help="Random seed, 64 bits: the same seed gives the same images on every runner."
    ),
    options.num_images,
    options.cfg_scale.but(
        help="Strength of classifier-free guidance; 1 is none.  [default: the bundle's;"
        " Janus-Pro: 5]"
    ),
    options.temperature.but(
        help=(
            "Sampling temperature, above 0: divides the logits.  [default: the bundle's; "
            "Janus-Pro: 1.0]"
        )
    ),
    options.top_k,
    options.greedy,
    options.out.but(
        metavar="FILE.png|DIR",
        help=(
            "File of the image; several images are out-000.png, out-001.png, ... beside a "
            "contact sheet here, each written as soon as it is done.  [default: out.png; with"
            " --prompts: out]"
        ),
    ),
    options.save_tokens,
    options.preview,
    options.batch.but(default=16, help="Images generated at once."),
    options.decoder_batch,
    options.lookahead,
    options.force_memory,
)
def command(**asked: Any) -> int | None:
    """Generate an image for each PROMPT, or for each line of a file.

    The bundle is one that `ssd-export export` wrote. Text chunks of the PNG record prompt, seed,
    policy and bundle. With --prompts, images that fail are listed and the exit code is then 3.
    """
    spec = GenerateSpec(**asked)
    given = (spec.prompts, spec.classes, spec.prompt_embeds, spec.prompt_file)
    if sum(map(bool, given)) != 1:
        raise click.UsageError(
            "give each PROMPT here, or --class NUMBER|NAME, or all of them with --prompts FILE or"
            " --prompt-embeds FILE"
        )
    if not all(str(prompt).strip() for prompt in spec.prompts):
        raise UserError("a PROMPT is empty: say what to generate")
    _check_numbers(spec)
    if spec.prompt_file is not None:
        from ssd_export.cli.generate_file import generate_file

        return generate_file(spec, spec.prompt_file)
    for flag, value in (("--ray", spec.ray), ("--ray-workers", spec.ray_workers)):
        if value is not None:
            raise UserError(
                f"{flag} is for a file of prompts; give --prompts FILE, or leave it out"
            )
    _generate_prompts(_with_prompts(spec), spec.out or Path("out.png"))
    return None


def _with_prompts(spec: GenerateSpec) -> GenerateSpec:
    """The spec with its classes or embedded prompts as prompts."""
    if spec.classes:
        return replace(spec, prompts=spec.classes)
    if spec.prompt_embeds is None:
        return spec
    from ssd_export.model.prompt_embeds import read_prompt_embeds

    return replace(spec, prompts=tuple(read_prompt_embeds(spec.prompt_embeds)))


def _generate_prompts(spec: GenerateSpec, out: Path) -> None:
    """Images of the prompts of the command line."""
    _check_places(spec, out)

    from ssd_export.bundle import CHECKING, read_config, resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.model.families import check_takes_classes
    from ssd_export.model.prompt import text_of
    from ssd_export.plan.generation import check_memory
    from ssd_export.plan.step_speed import StepClock, timed
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.runners import find_runner

    kind, path = find_runner(spec.runner), resolve_bundle(spec.bundle)
    provider, config = kind.provider(spec.provider), read_config(path)
    if spec.classes:
        check_takes_classes(config.model)
    prompts = list(map(text_of, spec.prompts))
    for line in what_is_asked(path, config, kind, provider, prompts):
        note(line)

    def check(opened: Bundle) -> None:
        if kind.memory_is_known and provider == "cpu" and not spec.force_memory:
            at_once = min(spec.batch, spec.total_images)
            beside = spec.total_images > at_once and spec.threads != 1
            check_memory(opened, at_once, spec.decoder_batch, beside)

    with (
        ProgressReport(in_bytes=(CHECKING,)) as progress,
        ImageGenerator.from_bundle(
            path, spec.runner, provider, spec.threads, check, progress
        ) as generator,
    ):
        note(threads_line(generator))
        clock = StepClock(generator.config.grid.width, generator.config.grid.num_tokens)
        event, paths, seconds = _generate(generator, spec, out, timed(progress, clock))
        speed = event.tokens.size / seconds
        click.echo(
            f"{paths[0]}: {_images(spec.total_images)} in {seconds:.2f} s ({speed:,.0f} tokens/s),"
            f" policy {generator.table.name}, budget {generator.table.budget:g}{_lossy(spec)}"
        )
        click.echo(_cache_line(event.cache))
        if provider == "cpu" and clock.seconds is not None:
            click.echo(_speed_line(generator, spec, clock.seconds))


def _lossy(spec: GenerateSpec) -> str:
    """What a reader of the result has to know of the mode; "" where tokens are those of any."""
    if rows_start(spec.lookahead) is None:
        return ""
    return f", {spec.lookahead}: not lossless, grid rows were decoded in parallel"


def _check_numbers(spec: GenerateSpec) -> None:
    options.check_runner(spec.runner, spec.provider, spec.threads)
    options.check_seed(spec.seed)
    options.lookahead_of(spec.lookahead)
    as_count(spec.num_images, "--num-images", way_out="use 1 or more", most=MAX_IMAGES)
    options.check_batch(spec.batch)
    options.check_batch(spec.decoder_batch, "--decoder-batch")
    options.check_sampling(spec.cfg_scale, spec.temperature, spec.top_k, spec.greedy)


def _check_places(spec: GenerateSpec, out: Path) -> None:
    """Everything that will be written can be: found out before the work."""
    from ssd_export.files import check_file, make_folder
    from ssd_export.runtime.images import check_images

    check_images(out, spec.total_images)
    if spec.save_tokens is not None:
        check_file(spec.save_tokens)
    if spec.preview is not None:
        make_folder(spec.preview)


def what_is_asked(
    path: Path, config: BundleConfig, kind: RunnerKind, provider: str, prompts: Sequence[str]
) -> list[str]:
    """Lines that name bundle, runner and captions outside the model's language, printed before the
    bundle's files are checked, which takes a while where they are large.
    """
    from ssd_export.demo.language import outside, speaks_demo
    from ssd_export.model.families import family_of

    policy = config.policy
    lines = [
        f"bundle {path}: {config.model_name}, policy {policy.name}, budget {policy.budget:g},"
        f" {_precision(config)}",
        f"runner {kind.name} ({kind.title}) on {provider}",
    ]
    if kind.widens_half and provider == "cpu":
        lines += _half_precision_lines(config)
    reads_captions = speaks_demo(config.model) and family_of(config.model).reads_text(config.model)
    return lines + (outside(prompts) if reads_captions else [])


def _half_precision_lines(config: BundleConfig) -> list[str]:
    """Lines on what would be better than float16 weights where no kernel multiplies them as they
    are.
    """
    is_arm = platform.machine().lower() in ("aarch64", "arm64")  # has float16 kernels
    if is_arm or config.dtype != "float16" or config.precision.weights != "none":
        return []
    return [
        "float16 weights are multiplied as float32 on this CPU, which takes its memory and time;"
        " export with --dtype fp32 --weights int8 for half of both"
    ]


def _precision(config: BundleConfig) -> str:
    """float32, weights int4, cache int8."""
    weights, cache = config.precision.name, config.policy.kv_dtype
    parts: list[str] = [config.dtype]
    parts += [f"weights {weights}"] * (weights != "none") + [f"cache {cache}"] * (cache != "model")
    return ", ".join(parts)


def threads_line(generator: ImageGenerator) -> str:
    """The line that says how many threads compute."""
    return f"{_threads(generator)} of the CPU"


def _threads(generator: ImageGenerator) -> str:
    count = generator.runner.num_threads
    return "all cores" if count == 0 else "1 thread" if count == 1 else f"{count} threads"


def _speed_line(generator: ImageGenerator, spec: GenerateSpec, seconds: float) -> str:
    """The speed of the decode steps, as a share of what this machine's memory allows, and with
    what.
    """
    from ssd_export.machine import num_cpus
    from ssd_export.plan.step_speed import packed_bytes, read_bandwidth, speed_line, step_bytes

    num_images = min(spec.batch, generator.runner.max_images, spec.total_images)
    num_bytes = step_bytes(generator.bundle, num_images)
    if generator.runner.fuses_steps:
        num_bytes -= packed_bytes(generator.bundle)
    bandwidth = read_bandwidth(num_bytes, generator.runner.num_threads or num_cpus())
    tokens = options.lookahead_of(spec.lookahead)
    mode = "one token a pass" if tokens == 1 else f"up to {tokens} tokens a pass"
    if tokens == "auto":
        mode = "as many tokens a pass as pay"
    elif isinstance(tokens, str):
        mode = f"{tokens}, grid rows in parallel: not the tokens of one a pass"
    used = f"{spec.runner}, {_threads(generator)}, {_precision(generator.bundle.config)}, {mode}"
    return f"{speed_line(seconds, num_images, num_bytes, bandwidth)}; {used}"


def _generate(
    generator: ImageGenerator, spec: GenerateSpec, out: Path, progress: Any
) -> tuple[RowEvent, list[Path], float]:
    """The last event, the images' paths, the sheet first, and the seconds without the sheet.

    Images, their tokens and previews are written on the way: whatever ends this leaves those that
    are done.
    """
    writer = _writer(generator, spec, out)
    began, num_saved = time.perf_counter(), 0
    try:
        for count, event in enumerate(
            generator.stream(
                spec.prompts,
                **spec.sampling,
                preview=spec.preview is not None,
                max_batch=min(spec.batch, generator.runner.max_images),
                decoder_batch=spec.decoder_batch,
                image_done=writer,
                progress=progress,
            )
        ):
            if spec.preview is not None and event.images is not None:
                _write_preview(spec.preview, count, event)
            if spec.save_tokens is not None and len(writer.written) > num_saved:
                num_saved = len(writer.written)
                _save_tokens(spec.save_tokens, event.tokens[:num_saved])
    except BaseException:
        if writer.written:
            note(_what_is_done(writer.written, spec.total_images))
        raise
    seconds = time.perf_counter() - began
    return event, writer.finish(event.images or []), seconds


def _writer(generator: ImageGenerator, spec: GenerateSpec, out: Path) -> ImageWriter:
    from ssd_export.model.prompt import text_of
    from ssd_export.runtime.images import ImageWriter

    shared, prompts = _provenance(generator, spec), list(map(text_of, spec.prompts))
    every = [prompt for prompt in prompts for _ in range(spec.num_images)]
    texts = [
        {"prompt": prompt, "image": str(index), **shared} for index, prompt in enumerate(every)
    ]
    return ImageWriter(out, texts, {"prompt": "\n".join(prompts), **shared})


def _provenance(generator: ImageGenerator, spec: GenerateSpec) -> Mapping[str, str]:
    from ssd_export.version import TOOL_VERSION

    own = generator.bundle.config.generation
    used = Sampling(own.cfg_scale, own.temperature).changed(spec.cfg_scale, spec.temperature)
    return {
        "seed": str(spec.seed),
        "policy": generator.table.name,
        "budget": f"{generator.table.budget:g}",
        "bundle_hash": generator.bundle.hash,
        "tool_version": TOOL_VERSION,
        **({"negative_prompt": spec.negative_prompt} if spec.negative_prompt else {}),
        "cfg_scale": f"{used.cfg_scale:g}",
        "temperature": "greedy" if spec.greedy else f"{used.temperature:g}",
        "top_k": str(spec.top_k),
        "num_images": str(spec.num_images),
        **({"lookahead": spec.lookahead} if _lossy(spec) else {}),
    }


def _write_preview(folder: Path, count: int, event: RowEvent) -> None:
    """A frame; the first one removes the frames of an earlier run, so that none are mixed."""
    from ssd_export.runtime.images import contact_sheet, write_png

    if count == 0:
        for path in folder.iterdir():
            if PREVIEW_NAME.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
    write_png(folder / f"row-{count:02d}.png", contact_sheet(event.images or []), {})


def _save_tokens(path: Path, tokens: Any) -> None:
    import numpy as np

    from ssd_export.files import write_file

    write_file(path, lambda file: np.save(file, tokens))


def _what_is_done(written: list[Path], total: int) -> str:
    names = str(written[0]) if len(written) == 1 else f"{written[0]} .. {written[-1]}"
    return f"{len(written)} of {_images(total)} done: {names}"


def _cache_line(cache: CacheReport) -> str:
    return (
        f"KV cache: {cache.bytes_per_image:,} bytes an image as allocated; its image slots "
        f"{cache.image_share:.3f} of a full cache; {cache.tokens_evicted:,} tokens evicted"
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def note(line: str) -> None:
    """A line on stderr; one that cannot be written ends nothing."""
    with suppress(OSError, ValueError):
        click.echo(line, err=True)
