"""A Docker build context: the bundle, this package and the server, for x86-64 and for Jetson.

    <context>/Dockerfile          x86-64 (and ARM servers), ONNX Runtime on the CPU
              Dockerfile.jetson   JetPack 6, its TensorRT and CUDA
              requirements.txt    requirements-jetson.txt
              app/ssd_export/     this package as it is installed here
              bundle/             a copy

An image needs no registry of ours: what it installs are the packages that ours requires.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.deploy.folder import copy_bundle, new_folder
from ssd_export.errors import UserError
from ssd_export.version import TOOL_VERSION

PACKAGE = Path(__file__).parents[1]
DISTRIBUTION = "ssd-export"
EXTRA = re.compile(r"(?:and )?extra == ['\"]([\w-]+)['\"]")  # of a marker
PORT = 8000
X86_BASE = "python:3.11-slim"
JETSON_BASE = "nvcr.io/nvidia/l4t-jetpack:r36.4.0"  # JetPack 6.1 and 6.2: TensorRT 10.3, CUDA 12.6
JETSON_CUDA = "cuda-bindings>=12.8,<13"  # JetPack brings TensorRT's Python module and CUDA 12
HEALTH = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=5)"
SERVER = f"""WORKDIR /srv
COPY app /srv/app
COPY bundle /srv/bundle
ENV PYTHONPATH=/srv/app PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 serve
USER serve
EXPOSE {PORT}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python3", "-c", "{HEALTH}"]
"""


@dataclass(frozen=True)
class DockerSpec:
    """A build context. max_batch: images at once."""

    context: Path
    max_batch: int
    force: bool


def write_context(bundle: Bundle, spec: DockerSpec) -> Path:
    """Writes the context; its folder.

    Raises: UserError where something is there, or this package was never installed.
    """
    with new_folder(spec.context, spec.force) as folder:
        texts = {
            "Dockerfile": x86_file(spec.max_batch),
            "Dockerfile.jetson": jetson_file(spec.max_batch),
            "requirements.txt": requirements("ort", "serve", pinned=True),
            "requirements-jetson.txt": requirements("serve", pinned=False) + f"{JETSON_CUDA}\n",
            ".dockerignore": "**/__pycache__\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "app" / PACKAGE.name, ignore=ignored)
        copy_bundle(bundle, folder / "bundle")
    return spec.context


def requirements(*extras: str, pinned: bool) -> str:
    """The packages that ours needs with these extras, as pip reads them.

    Args: pinned: to the versions of this machine, where it has one; a base with another Python may
    not have them.
    Raises: UserError where this package was never installed.
    """
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        raise UserError(
            "this package is not installed, so nothing says what it requires: pip install it first"
        ) from None
    lines = set()
    for requirement in listed:
        package, _, marker = requirement.partition(";")
        extra = EXTRA.search(marker)
        name = re.split(r"[^A-Za-z0-9_.-]", package.strip())[0]
        if name == DISTRIBUTION or (extra is not None and extra[1] not in extras):
            continue
        marker = EXTRA.sub("", marker).strip()
        what = package.strip()
        if pinned and not marker:
            with suppress(PackageNotFoundError):
                what = f"{name}=={version(name)}"
        lines.add(f"{what} ; {marker}" if marker else what)
    return "".join(f"{line}\n" for line in sorted(lines))


def x86_file(max_batch: int) -> str:
    """The Dockerfile for x86-64."""
    return f"""# Written by ssd-export {TOOL_VERSION}.
#   docker build --tag ssd-export .
#   docker run --env SSD_EXPORT_KEY=... --publish {PORT}:{PORT} ssd-export
FROM {X86_BASE}
COPY requirements.txt /srv/
RUN python3 -m pip install --no-cache-dir --requirement /srv/requirements.txt
{SERVER}{_entry("ort", "cpu", max_batch)}"""


def jetson_file(max_batch: int) -> str:
    """The Dockerfile for Jetson Orin. Engines are built on the board: see docs."""
    return f"""# Written by ssd-export {TOOL_VERSION}. Build and run it on the board (JetPack 6):
#   docker build --file Dockerfile.jetson --tag ssd-export .
#   docker run --runtime nvidia --env SSD_EXPORT_KEY=... --publish {PORT}:{PORT} ssd-export
# Engines in bundle/ must be built on this kind of board first: ssd-export build-engine.
FROM {JETSON_BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends python3-pip \\
    && rm -rf /var/lib/apt/lists/*
COPY requirements-jetson.txt /srv/requirements.txt
RUN python3 -m pip install --no-cache-dir --requirement /srv/requirements.txt
{SERVER}{_entry("trt", "cuda", max_batch)}"""


def _entry(runner: str, provider: str, max_batch: int) -> str:
    words = ["python3", "-m", "ssd_export", "serve", "--bundle", "/srv/bundle"]
    words += ["--host", "0.0.0.0", "--port", str(PORT)]
    words += ["--runner", runner, "--provider", provider, "--max-batch", str(max_batch)]
    return f"ENTRYPOINT [{', '.join(f'{chr(34)}{word}{chr(34)}' for word in words)}]\n"
