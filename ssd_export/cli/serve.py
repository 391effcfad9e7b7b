"""ssd-export serve: images over HTTP, in the shape of the OpenAI Images API."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ssd_export.cli import options
from ssd_export.errors import UserError

KEY_VARIABLE = "SSD_EXPORT_KEY"


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle to serve.  [default: the one exported last from this folder]",
)
@options.runner
@options.provider
@options.threads
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="NUMBER"
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="COUNT",
    help="Images generated together; requests share a batch.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="COUNT",
    help="Images in the queue; beyond it a request is answered with 429.",
)
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Time limit of a request.",
)
def command(**asked: object) -> None:
    """Serve a bundle over HTTP.

    POST /v1/images/generations as OpenAI clients send it, a page at /, /health and /metrics. With
    SSD_EXPORT_KEY in the environment, clients must send that key. SIGTERM finishes what was
    accepted; SIGHUP opens the bundle again.
    """
    from ssd_export.serve.run import ServeSpec, open_server, serve

    spec = ServeSpec(**asked, key=os.environ.get(KEY_VARIABLE))  # type: ignore[arg-type]
    if spec.host not in ("127.0.0.1", "::1", "localhost") and not spec.key:
        raise UserError(
            f"--host {spec.host} is reachable from other machines: set {KEY_VARIABLE} to a key that"
            " clients must send, or keep the default 127.0.0.1"
        )
    serve(spec, open_server(spec))
