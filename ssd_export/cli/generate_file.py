"""ssd-export generate --prompts FILE: images for a file of prompts, resumed where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssd_export.cli import options
from ssd_export.cli.generate import GenerateSpec, note, threads_line, what_is_asked
from ssd_export.errors import UserError
from ssd_export.extras import check_extras

if TYPE_CHECKING:
    from ssd_export.bundle.config import GenerationDefaults
    from ssd_export.prompt_files.run import Summary
    from ssd_export.prompt_files.tasks import Defaults, ImageTask
    from ssd_export.prompt_files.worker import WorkerSpec
    from ssd_export.runtime.generate import Progress

SOME_FAILED = 3  # exit code
LISTED = 20  # failed images on the terminal; results.jsonl has all


def generate_file(spec: GenerateSpec, file: Path) -> int:
    """Makes the images of a file that are not there yet; the exit code."""
    _check_options(spec)
    check_extras(["ray"] if spec.ray is not None else [])

    from ssd_export.bundle import CHECKING, read_config, resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.model.families import check_takes_classes
    from ssd_export.prompt_files.lines import read_prompts
    from ssd_export.prompt_files.tasks import image_tasks
    from ssd_export.prompt_files.worker import WorkerSpec
    from ssd_export.runtime.runners import find_runner

    lines = read_prompts(file)
    kind, path = find_runner(spec.runner), resolve_bundle(spec.bundle)
    config, provider = read_config(path), kind.provider(spec.provider)
    if any(line.is_class for line in lines.values()):
        check_takes_classes(config.model)
    tasks = image_tasks(lines, spec.num_images, _defaults(spec, config.generation))
    for line in what_is_asked(path, config, kind, provider, [task.prompt for task in tasks]):
        note(line)
    checks_memory = kind.memory_is_known and provider == "cpu" and not spec.force_memory
    worker = WorkerSpec(
        path.resolve(),
        spec.runner,
        provider,
        spec.threads,
        min(spec.batch, len(tasks)),
        checks_memory,
        options.lossless_lookahead_of(spec.lookahead),
    )
    out = spec.out or Path("out")
    with ProgressReport(in_bytes=(CHECKING,)) as progress:
        run = _run_here if spec.ray is None else _run_on_ray
        return _report(run(spec, worker, tasks, out, progress), out)


def _run_here(
    spec: GenerateSpec, worker: WorkerSpec, tasks: list[ImageTask], out: Path, progress: Progress
) -> Summary:
    from ssd_export.prompt_files.results import Results
    from ssd_export.prompt_files.run import run_here

    with (
        worker.open_generator(progress) as generator,
        Results(out, generator.bundle.hash) as results,
    ):
        note(threads_line(generator))
        return run_here(generator, tasks, worker.batch, results, progress, worker.lookahead)


def _run_on_ray(
    spec: GenerateSpec, worker: WorkerSpec, tasks: list[ImageTask], out: Path, progress: Progress
) -> Summary:
    from ssd_export.bundle import open_bundle
    from ssd_export.prompt_files.on_ray import ClusterSpec, cluster, run_on_ray
    from ssd_export.prompt_files.results import Results
    from ssd_export.runtime.prompt_batch import PromptBatches

    bundle = open_bundle(worker.bundle, progress)
    where = ClusterSpec(spec.ray or None, spec.ray_workers)
    check = PromptBatches.from_bundle(bundle).check
    with Results(out, bundle.hash) as results, cluster(where):
        return run_on_ray(where, worker, tasks, results, check, progress)


def _check_options(spec: GenerateSpec) -> None:
    """Raises UserError for what is of one call with few images."""
    given = {
        "--preview": spec.preview is not None,
        "--save-tokens": spec.save_tokens is not None,
        "--decoder-batch": spec.decoder_batch != 1,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UserError(f"{flag} does not go with --prompts; leave it out, or give one PROMPT")
    if spec.ray_workers is not None and spec.ray is None:
        raise UserError("--ray-workers are those of a Ray cluster; give --ray, or leave it out")


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
