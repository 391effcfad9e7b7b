"""ssd-export serve: images over HTTP, in the shape of the OpenAI Images API."""

from __future__ import annotations

import os
from typing import Any

import click

from ssd_export.cli import options
from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError

KEY_VARIABLE = "SSD_EXPORT_KEY"


@verb(
    options.bundle.but(help=f"The bundle to serve.  {options.LATEST}"),
    options.runner,
    options.provider,
    options.threads,
    option("--host", default="127.0.0.1", help="Address to listen on."),
    option("--port", type=click.IntRange(0, 65535), default=8000, metavar="NUMBER"),
    option(
        "--max-batch",
        type=click.IntRange(min=1),
        default=8,
        metavar="COUNT",
        help="Images generated together; requests share a batch.",
    ),
    option(
        "--max-waiting",
        type=click.IntRange(min=1),
        default=64,
        metavar="COUNT",
        help="Images in the queue; beyond it a request is answered with 429.",
    ),
    options.lookahead,
    option(
        "--timeout",
        "seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=600.0,
        metavar="SECONDS",
        help="Time limit of a request.",
    ),
)
def command(lookahead: str, **asked: Any) -> None:
    """Serve a bundle over HTTP.

    POST /v1/images/generations as OpenAI clients send it, a page at /, /health and /metrics. With
    SSD_EXPORT_KEY in the environment, clients must send that key. SIGTERM finishes what was
    accepted; SIGHUP opens the bundle again.
    """
    options.check_runner(asked["runner"], asked["provider"], asked["threads"])
    options.check_batch(asked["max_batch"], "--max-batch")
    asked["lookahead"] = options.lossless_lookahead_of(lookahead)

    from ssd_export.serve.run import ServeSpec, open_server, serve

    spec = ServeSpec(**asked, key=os.environ.get(KEY_VARIABLE))
    if spec.host not in ("127.0.0.1", "::1", "localhost") and not spec.key:
        raise UserError(
            f"--host {spec.host} is reachable from other machines: set {KEY_VARIABLE} to a key that"
            " clients must send, or keep the default 127.0.0.1"
        )
    serve(spec, open_server(spec))
