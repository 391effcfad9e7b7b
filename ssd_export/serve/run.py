"""Runs the server until SIGTERM or SIGINT; SIGHUP opens the bundle again.

A stop refuses new connections and finishes every request that was accepted.
"""

from __future__ import annotations

import logging
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ssd_export.bundle import read_config, resolve_bundle
from ssd_export.model.families import check_can_be_asked
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.serve.app import Server, make_app
from ssd_export.serve.batcher import MicroBatcher
from ssd_export.serve.connection import Connection
from ssd_export.serve.generation import GeneratorBatches
from ssd_export.serve.metrics import Metrics

log = logging.getLogger(__name__)
SECONDS_FOR_IDLE_CONNECTIONS = 5


@dataclass(frozen=True)
class ServeSpec:
    """Options of serve. seconds: a request's time limit; max_waiting: images in the queue;
    lookahead: tokens of an image that a pass tries, or auto.
    """

    bundle: Path | None
    runner: str
    provider: str
    threads: int | None
    host: str
    port: int
    max_batch: int
    max_waiting: int
    seconds: float
    key: str | None
    lookahead: int | str = 1


def open_server(spec: ServeSpec) -> Server:
    """The generator opened and warm. Raises: UserError for what cannot be opened."""
    path = resolve_bundle(spec.bundle)
    check_can_be_asked(read_config(path).model)
    opened: list[GeneratorBatches] = []
    metrics = Metrics()

    def open_generator() -> GeneratorBatches:
        generator = ImageGenerator.from_bundle(
            path, runner=spec.runner, provider=spec.provider, num_threads=spec.threads
        )
        metrics.tokens_an_image = generator.config.grid.num_tokens
        try:
            batches = GeneratorBatches(generator, metrics, spec.lookahead)
            batches.warm()
        except BaseException:
            generator.close()
            raise
        opened[:] = [batches]
        return batches

    batcher = MicroBatcher(
        open_generator, max_batch=spec.max_batch, max_waiting=spec.max_waiting, observer=metrics
    )
    max_batch = min(spec.max_batch, opened[0].max_images)
    return Server(batcher, metrics, spec.runner, max_batch, spec.seconds, opened, int(time.time()))


def serve(spec: ServeSpec, server: Server) -> None:
    """Answers requests until a signal ends it."""
    app = make_app(server, spec.key)
    config = uvicorn.Config(
        app,
        host=spec.host,
        port=spec.port,
        http=Connection,
        log_level="info",
        timeout_keep_alive=SECONDS_FOR_IDLE_CONNECTIONS,
        server_header=False,
    )
    with suppress(ValueError):  # not in the main thread
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: server.batcher.reload())
    running = uvicorn.Server(config)
    try:
        running.run()
    except (KeyboardInterrupt, SystemExit):  # uvicorn sends itself the signal that stopped it
        if not running.should_exit:
            raise
