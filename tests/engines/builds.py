"""The C++ library as the tests build it, once a run for each kind of build, and what it needs.

SSD_ENGINES_BUILD=DIR keeps the builds in a folder, for those who work on the library. Without it
builds share the objects of files that they compile alike.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.made_once import held, made_once

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
    with held(folder / "onnxruntime.lock"):
        if not (target / "include").is_dir():
            script = ENGINES / "scripts" / "fetch_onnxruntime_headers.sh"
            fetched = run([script, target, *([architecture] if architecture else [])])
            if fetched.returncode:
                reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"needs ONNX Runtime's headers (ONNXRUNTIME_ROOT=DIR): {reason}")
    return target


OTHER_INSTRUCTIONS = ("baseline", "avx2", "avx512", "avx512vnni")


def build_operators(folder: Path, *options: str) -> None:
    """Builds the library of operators for Python; skips with what this machine lacks."""
    headers = onnxruntime_headers(folder)
    command = ["cmake", "-S", ENGINES / "operators", "-B", folder, f"-DONNXRUNTIME_ROOT={headers}"]
    try:
        made = run([*command, *options])
    except FileNotFoundError:
        pytest.skip(NEEDS)
    if made.returncode:
        pytest.skip(one_line(made))
    built = run(["cmake", "--build", folder])
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
    assert "warning:" not in built.stdout + built.stderr, built.stderr[-4000:]


class Builds:
    """Build folders by kind; each is configured and compiled when it is first asked for.

    folder: of the whole run, its builds are made once however many workers it has; or one kept
    between runs, in which cmake finds what has changed.
    """

    def __init__(self, folder: Path, kept: bool) -> None:
        self.folder, self._kept = folder, kept
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
        shared = [] if self._kept else [launcher(self.folder / "objects")]
        return run(
            ["cmake", "-S", ENGINES, "-B", self.folder / name, *shared, *self.options(*options)]
        )

    def compile(self, folder: Path) -> None:
        """Compiles a configured build: on two cores, for the other worker often waits for it."""
        built = run(["cmake", "--build", folder, "--parallel", "2"])
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
        assert "warning:" not in built.stdout + built.stderr, built.stderr[-4000:]

    def __call__(self, name: str, *options: str) -> Path:
        """The build of that name, with tests and examples; skips with what this machine lacks."""

        def make(folder: Path) -> None:
            configured = self.configure(
                name, "-DSSD_RUNTIME_TESTS=ON", "-DSSD_RUNTIME_EXAMPLES=ON", *options
            )
            if configured.returncode:
                pytest.skip(one_line(configured))
            self.compile(folder)

        if name not in self._made:
            folder = self.folder / name
            if self._kept:
                make(folder)
            else:
                made_once(folder, make)
            self._made[name] = folder
        return self._made[name]


def launcher(objects: Path) -> str:
    """The option by which builds share objects."""
    script = Path(__file__).with_name("object_cache.py")
    return f"-DCMAKE_CXX_COMPILER_LAUNCHER={sys.executable};-SE;{script};{objects}"


def sanitized(build: Builds, sanitizer: str) -> Path:
    """A build with a sanitizer; no optimization, for it compiles faster."""
    return build(
        sanitizer.replace(",", "-"),
        f"-DSSD_RUNTIME_SANITIZE={sanitizer}",
        "-DCMAKE_BUILD_TYPE=Debug",
    )


MEMORY = "address,undefined"
CLANG = ("-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_C_COMPILER=clang", "-DCMAKE_BUILD_TYPE=Debug")


@cache
def clang_sanitizes() -> bool:
    """Whether clang is here, with the libraries of the sanitizers of MEMORY."""
    if shutil.which("clang++") is None:
        return False
    with TemporaryDirectory() as folder:
        command = ["clang++", f"-fsanitize={MEMORY}", "-x", "c++", "-", "-o", Path(folder) / "a"]
        return run(command, input="int main() {}").returncode == 0


def by_clang(build: Builds) -> Path:
    """clang's build, with the sanitizers of MEMORY if it has them: one build shows that clang has
    no warning, and runs under them.
    """
    more = [
        f"-DSSD_RUNTIME_SANITIZE={MEMORY}",
        # What the sanitizers of C++ ask for, the example in C is linked with too.
        "-DCMAKE_EXE_LINKER_FLAGS=-fsanitize-link-c++-runtime",
        "-DCMAKE_C_STANDARD_LIBRARIES=-lstdc++",
    ]
    return build("clang", *CLANG, *(more if clang_sanitizes() else []))


def memory_checked(build: Builds) -> Path:
    """A build under the sanitizers of MEMORY, by clang or else by the default compiler."""
    return by_clang(build) if clang_sanitizes() else sanitized(build, MEMORY)
