"""ssd-export package: a bundle as other servers take it."""

from __future__ import annotations

import re
from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb


@verb(
    options.bundle.but(help=f"The bundle to package.  {options.LATEST}"),
    option(
        "--triton",
        "repository",
        type=options.FILE,
        metavar="DIR",
        help="Write a model into this repository of Triton Inference Server.",
    ),
    option(
        "--docker",
        "context",
        type=options.FILE,
        metavar="DIR",
        help="Write a Docker build context: Dockerfile (x86-64) and Dockerfile.jetson.",
    ),
    option(
        "--name",
        metavar="NAME",
        help="The model's name in the repository.  [default: the bundle's]",
    ),
    options.runner.but(help="Who computes in Triton."),
    options.provider.but(help="Where the runner computes in Triton."),
    options.threads.but(help="CPU threads in Triton."),
    option(
        "--max-batch",
        type=click.IntRange(min=1),
        default=8,
        metavar="COUNT",
        help="Images generated together.",
    ),
    option("--force", is_flag=True, help="Replace what is there."),
)
def command(
    bundle: Path | None,
    repository: Path | None,
    context: Path | None,
    name: str | None,
    runner: str,
    provider: str | None,
    threads: int | None,
    max_batch: int,
    force: bool,
) -> None:
    """Package a bundle for another server.

    What is written holds a copy of the bundle and stands by itself.
    """
    if repository is None and context is None:
        raise click.UsageError("say what to write: --triton DIR, --docker DIR, or both")
    options.check_runner(runner, provider, threads)
    options.check_batch(max_batch, "--max-batch")

    from ssd_export.bundle import CHECKING, open_bundle, resolve_bundle
    from ssd_export.cli.progress import ProgressReport
    from ssd_export.runtime.runners import find_runner

    with ProgressReport(in_bytes=(CHECKING,)) as progress:
        opened = open_bundle(resolve_bundle(bundle), progress)
    if repository is not None:
        from ssd_export.deploy.triton_repository import TritonSpec, write_repository

        own = re.sub(r"[^A-Za-z0-9_.-]+", "-", opened.config.model_name).strip("-.") or "ssd-export"
        where = find_runner(runner).provider(provider)
        spec = TritonSpec(repository, name or own, runner, where, threads, max_batch, force)
        click.echo(write_repository(opened, spec))
    if context is not None:
        from ssd_export.deploy.docker import DockerSpec, write_context

        click.echo(write_context(opened, DockerSpec(context, max_batch, force)))
