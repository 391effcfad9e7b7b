"""ssd-export generate --prompts FILE: images for a file of prompts, resumed where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_export.cli.generate import GenerateSpec, note, threads_line, what_is_asked
from ssd_export.errors import UserError

if TYPE_CHECKING:
    from ssd_export.bundle import Bundle
    from ssd_export.bundle.config import GenerationDefaults
    from ssd_export.prompt_files.run import Summary
    from ssd_export.prompt_files.tasks import Defaults

SOME_FAILED = 3  # exit code
LISTED = 20  # failed images on the terminal; results.jsonl has all


def generate_file(spec: GenerateSpec, file: Path) -> int:
    """Makes the images of a file that are not there yet; the exit code."""
    _check_options(spec)

    from ssd_export.bundle import CHECKING, read_config, resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.plan.generation import check_memory
    from ssd_export.prompt_files.lines import read_prompts
    from ssd_export.prompt_files.results import Results
    from ssd_export.prompt_files.run import run_here
    from ssd_export.prompt_files.tasks import image_tasks
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.runners import find_runner

    lines = read_prompts(file)
    kind, path = find_runner(spec.runner), resolve_bundle(spec.bundle)
    config, provider = read_config(path), kind.provider(spec.provider)
    tasks = image_tasks(lines, spec.num_images, _defaults(spec, config.generation))
    for line in what_is_asked(path, config, kind, provider, [t.request.prompt for t in tasks]):
        note(line)
    out = spec.out or Path("out")

    def check(opened: Bundle) -> None:
        if kind.memory_is_known and provider == "cpu" and not spec.force_memory:
            check_memory(opened, min(spec.batch, len(tasks)))

    with (
        ProgressReport(in_bytes=(CHECKING,)) as progress,
        ImageGenerator.from_bundle(
            path, spec.runner, provider, spec.threads, check, progress
        ) as generator,
        Results(out, generator.bundle.hash) as results,
    ):
        note(threads_line(generator))
        summary = run_here(generator, tasks, spec.batch, results, progress)
    return _report(summary, out)


def _check_options(spec: GenerateSpec) -> None:
    """Raises UserError for what is of one call with few images."""
    given = {
        "--preview": spec.preview is not None,
        "--save-tokens": spec.save_tokens is not None,
        "--lookahead": spec.lookahead != "off",
        "--decoder-batch": spec.decoder_batch != 1,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UserError(f"{flag} does not go with --prompts; leave it out, or give one PROMPT")


def _defaults(spec: GenerateSpec, own: GenerationDefaults) -> Defaults:
    from ssd_export.prompt_files.tasks import Defaults
    from ssd_export.sampling import Sampling

    sampling = Sampling(own.cfg_scale, own.temperature).changed(
        spec.cfg_scale, 0.0 if spec.greedy else spec.temperature, 0 if spec.greedy else spec.top_k
    )
    return Defaults(spec.seed, spec.negative_prompt, sampling)


def _report(summary: Summary, out: Path) -> int:
    for outcome in summary.failed[:LISTED]:
        note(f"line {outcome.task.line}, image {outcome.task.image}: {outcome.error}")
    if len(summary.failed) > LISTED:
        note(f"... and {len(summary.failed) - LISTED} more: {out / 'results.jsonl'} has all")
    click.echo(
        f"{out}: {summary.done} images made, {summary.already} were there,"
        f" {len(summary.failed)} failed"
    )
    return SOME_FAILED if summary.failed else 0
