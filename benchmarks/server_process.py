"""A server in a separate process, and requests to it by hand."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES_PATH = "/v1/images/generations"
START_SECONDS = 600.0  # on the busiest machine


class ServerProcess:
    """`ssd-export serve` on a free port; its log is a file, so that it never waits for a reader. A
    context manager.
    """

    def __init__(self, bundle: Path, log: Path, *options: str, **environment: str) -> None:
        """Starts it and waits until it answers. Raises: AssertionError, with its log."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = (sys.executable, "cli.py", "serve", "--port", str(self.port), *options)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--bundle", str(bundle)],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends and self.process.poll() is None:
            try:
                assert self.ask("GET", "/health")[0] == 200
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(log.read_text() if log.is_file() else "it did not start")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is not open yet."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer. Args: body: bytes, or what becomes JSON."""
        connection = self.connect()
        content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.request(
                method, path, content, {"Content-Type": "application/json", **headers}
            )
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A number of /metrics, labels included in the name; 0 where it is not there yet."""
        for line in self.ask("GET", "/metrics")[2].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stop(self) -> int:
        """Sends SIGTERM where it still runs; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_SECONDS)


def pixels_of(text: str) -> np.ndarray:
    """Pixels of an image in an answer, uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
