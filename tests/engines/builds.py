"""The C++ library as the tests build it, once a run for each kind of build, and what it needs.

SSD_ENGINES_BUILD=DIR keeps the builds in a folder, for those who work on the library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "engines"
NEEDS = "needs cmake and a C++ compiler, then engines/scripts/install_dependencies.sh"


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


def one_line(cmake: subprocess.CompletedProcess[str]) -> str:
    """What cmake refuses for, without its call stack and line breaks."""
    text = " ".join(cmake.stderr.split())
    return text.partition("(message): ")[2].partition(" Call Stack")[0] or text


@cache
def onnxruntime_library() -> Path | None:
    """The library that Python's package brings."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.1.*"))
    return found[-1] if found else None


def onnxruntime_headers(folder: Path, architecture: str = "") -> Path:
    """ONNXRUNTIME_ROOT, else a folder with the headers of Debian 13; skips where neither is had."""
    if not architecture and "ONNXRUNTIME_ROOT" in os.environ:
        return Path(os.environ["ONNXRUNTIME_ROOT"])
    target = folder / f"onnxruntime{architecture}"
    if not (target / "include").is_dir():
        script = ENGINES / "scripts" / "fetch_onnxruntime_headers.sh"
        fetched = run([script, target, *([architecture] if architecture else [])])
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"needs ONNX Runtime's headers (ONNXRUNTIME_ROOT=DIR): {reason}")
    return target


class Builds:
    """Build folders by kind; each is configured and compiled when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Path] = {}

    def options(self, *more: str) -> list[str]:
        if shutil.which("cmake") is None:
            pytest.skip(NEEDS)
        library = onnxruntime_library()
        if library is None:
            pytest.skip("needs the library of Python's onnxruntime: pip install onnxruntime")
        headers = onnxruntime_headers(self.folder)
        return [f"-DONNXRUNTIME_ROOT={headers}", f"-DONNXRUNTIME_LIBRARY={library}", *more]

    def configure(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return run(["cmake", "-S", ENGINES, "-B", self.folder / name, *self.options(*options)])

    def __call__(self, name: str, *options: str) -> Path:
        """The build of that name, with tests and examples; skips with what this machine lacks."""
        if name in self._made:
            return self._made[name]
        configured = self.configure(
            name, "-DSSD_RUNTIME_TESTS=ON", "-DSSD_RUNTIME_EXAMPLES=ON", *options
        )
        if configured.returncode:
            pytest.skip(one_line(configured))
        built = run(["cmake", "--build", self.folder / name])
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
        assert "warning:" not in built.stdout + built.stderr, built.stderr[-4000:]
        self._made[name] = self.folder / name
        return self._made[name]


def sanitized(build: Builds, sanitizer: str) -> Path:
    """A build with a sanitizer; no optimization, for it compiles faster."""
    return build(
        sanitizer.replace(",", "-"),
        f"-DSSD_RUNTIME_SANITIZE={sanitizer}",
        "-DCMAKE_BUILD_TYPE=Debug",
    )
