"""The Docker context: its files are what its Dockerfiles name, and what the image would start
starts here. No Docker runs here, so no image was built.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.deploy.docker import DockerSpec, requirements, write_context
from ssd_export.model.find import DEMO_CHECKPOINT
from tests.runtime.checkpoints import bundle

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install ssd-export[serve]")
INSTRUCTIONS = {"FROM", "COPY", "RUN", "WORKDIR", "ENV", "USER", "EXPOSE", "STOPSIGNAL"} | {
    "HEALTHCHECK",
    "ENTRYPOINT",
}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_bundle(bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1))
    return write_context(opened, DockerSpec(tmp_path_factory.mktemp("d") / "context", 4, False))


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", file.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_a_dockerfile_names_what_is_there(context: Path, name: str) -> None:
    found = instructions(context / name)
    assert found[0][0] == "FROM" and {word for word, _ in found} <= INSTRUCTIONS
    for word, rest in found:
        if word == "COPY":
            assert (context / rest.split()[0]).exists()
        if word == "ENTRYPOINT":
            assert json.loads(rest)[:4] == ["python3", "-m", "ssd_export", "serve"]
        if word == "HEALTHCHECK":
            assert json.loads(rest.partition("CMD ")[2])[:2] == ["python3", "-c"]
    assert ("USER", "serve") in found


def test_requirements_are_those_of_the_extras() -> None:
    pinned = requirements("ort", "serve", pinned=True).splitlines()
    names = {re.split("[=> ]", line)[0] for line in pinned}
    assert {"numpy", "onnxruntime", "fastapi", "uvicorn"} <= names
    assert not names & {"torch", "transformers", "ray", "pytest"}
    assert f"numpy=={version('numpy')}" in pinned
    assert "fastapi>=" in requirements("serve", pinned=False)
    assert "onnxruntime" not in requirements("serve", pinned=False)


def test_what_the_image_starts_starts_here(context: Path) -> None:
    (entry,) = (rest for word, rest in instructions(context / "Dockerfile") if word == "ENTRYPOINT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {"/srv/bundle": str(context / "bundle"), "0.0.0.0": "127.0.0.1", "8000": str(port)}
    command = [sys.executable, *(changes.get(word, word) for word in json.loads(entry)[1:])]
    environment = {**os.environ, "PYTHONPATH": str(context / "app"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=context, env=environment, stderr=subprocess.PIPE)
    ends = time.monotonic() + 600
    try:
        while time.monotonic() < ends and process.poll() is None:
            try:
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                assert answer.status == 200
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(process.stderr.read().decode() if process.stderr else "")
    finally:
        process.terminate()
        process.wait(60)
