"""The library as others get it: installed, found by CMake and pkg-config, packaged, cross-compiled;
its headers and examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_export.runtime.generate import ImageGenerator
from tests.engines.builds import ENGINES, Builds, by_clang, one_line, run
from tests.engines.cases import prompt_encoder, run_cases

Bundles = Callable[[str], Path]
PROMPT = "a red circle on white"
HEADERS = ENGINES / "include" / "ssd_runtime"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: engines/scripts/install_dependencies.sh")


@pytest.fixture(scope="module")
def installed(build: Builds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    done = run(["cmake", "--install", build("release"), "--prefix", prefix])
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture(scope="module")
def generated(bundles: Bundles) -> np.ndarray:
    with ImageGenerator.from_bundle(bundles("ssd-auto")) as generator:
        return np.asarray(generator([PROMPT]).images[0])


def library_folder(prefix: Path) -> Path:
    return next(prefix.rglob("libssd_runtime.so")).parent


def test_the_headers_are_short_and_need_nothing_but_the_compiler(tmp_path: Path) -> None:
    assert len((HEADERS / "ssd_runtime.h").read_text().splitlines()) <= 260
    assert len((HEADERS / "ssd_runtime.hpp").read_text().splitlines()) <= 150
    need("gcc", "g++")
    (tmp_path / "c.c").write_text(
        '#include "ssd_runtime/ssd_runtime.h"\nint main(void) { return 0; }\n'
    )
    (tmp_path / "cpp.cpp").write_text('#include "ssd_runtime/ssd_runtime.hpp"\nint main() {}\n')
    strict = [
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        f"-I{ENGINES / 'include'}",
    ]
    for command in (["gcc", "-std=c99", "c.c"], ["g++", "-std=c++17", "cpp.cpp"]):
        compiled = run([*command, *strict], cwd=tmp_path)
        assert compiled.returncode == 0, compiled.stderr


def test_examples_are_as_short_as_promised() -> None:
    lines = {
        path.name: len(path.read_text().splitlines())
        for path in (ENGINES / "examples").iterdir()
        if path.is_file()
    }
    assert lines["generate.c"] < 60 and lines["generate.cpp"] < 40 and lines["generate.py"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("example", ["generate_c", "generate_cpp"])
def test_the_examples_write_the_image(
    example: str, build: Builds, bundles: Bundles, generated: np.ndarray, tmp_path: Path
) -> None:
    program = build("release") / "examples" / example
    ran = run([program, bundles("ssd-auto"), PROMPT, tmp_path / "out.png"])
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), generated)
    failed = run([program, "/nowhere", PROMPT, tmp_path / "no.png"])
    assert failed.returncode == 1 and failed.stderr.startswith("error: no bundle at /nowhere")


@pytest.mark.slow
def test_the_python_example(bundles: Bundles, generated: np.ndarray, tmp_path: Path) -> None:
    ran = run(
        [
            sys.executable,
            ENGINES / "examples" / "generate.py",
            bundles("ssd-auto"),
            PROMPT,
            "o.png",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ENGINES.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), generated)


@pytest.mark.slow
def test_the_preview_grows_in_a_terminal(build: Builds, bundles: Bundles) -> None:
    ran = run([build("release") / "examples" / "preview", bundles("ssd-auto"), PROMPT])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\x1b[24A") == 23, "every row but the first goes back to the top"
    assert ran.stdout.count("\N{UPPER HALF BLOCK}") == 24 * 24 * 48


@pytest.mark.slow
def test_a_project_outside_finds_it_with_cmake(
    installed: Path, bundles: Bundles, generated: np.ndarray, tmp_path: Path
) -> None:
    """As the documentation says, without a word of where ONNX Runtime is."""
    program = built_outside(installed, tmp_path)
    ran = run(
        [program, bundles("ssd-auto"), PROMPT, tmp_path / "o.png"],
        env={"PATH": os.environ["PATH"]},
    )
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), generated)


@pytest.mark.slow
def test_an_archive_is_linked_by_a_project_outside(
    build: Builds, bundles: Bundles, generated: np.ndarray, tmp_path: Path
) -> None:
    """libssd_runtime.a: find_package finds what it needs, too."""
    static, prefix = build("static", "-DBUILD_SHARED_LIBS=OFF"), tmp_path / "prefix"
    done = run(["cmake", "--install", static, "--prefix", prefix])
    assert done.returncode == 0 and list(prefix.rglob("libssd_runtime.a")), done.stderr
    program = built_outside(prefix, tmp_path)
    ran = run([program, bundles("ssd-auto"), PROMPT, tmp_path / "o.png"])
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png")), generated)


def built_outside(prefix: Path, folder: Path) -> Path:
    """The example in C, built as a project that finds an installed library."""
    shutil.copytree(ENGINES / "examples", folder / "project")
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    configured = run(["cmake", "-S", folder / "project", "-B", folder / "b", found])
    assert configured.returncode == 0, configured.stderr
    compiled = run(["cmake", "--build", folder / "b"])
    assert compiled.returncode == 0, compiled.stderr
    return folder / "b" / "generate_c"


@pytest.mark.slow
def test_another_version_is_refused_by_find_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(app LANGUAGES CXX)\n"
        "find_package(ssd_runtime 0.2 REQUIRED)\n"
    )
    found = f"-Dssd_runtime_DIR={library_folder(installed) / 'cmake' / 'ssd_runtime'}"
    configured = run(["cmake", "-S", tmp_path, "-B", tmp_path / "b", found])
    assert configured.returncode and "0.1.0" in configured.stderr


@pytest.mark.slow
def test_pkg_config_finds_it(installed: Path, tmp_path: Path) -> None:
    need("pkg-config", "gcc")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(library_folder(installed) / "pkgconfig")}
    flags = run(["pkg-config", "--cflags", "--libs", "ssd_runtime"], env=environment)
    assert flags.returncode == 0, flags.stderr
    compiled = run(
        ["gcc", ENGINES / "examples" / "generate.c", "-o", tmp_path / "app"] + flags.stdout.split()
    )
    assert compiled.returncode == 0, compiled.stderr


@pytest.mark.slow
def test_what_the_library_needs_and_exports(installed: Path) -> None:
    need("readelf", "nm")
    library = library_folder(installed) / "libssd_runtime.so"
    read = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(?:lib)?([a-z_+0-9]+?)(?:-[0-9.]+)?\.so", read))
    allowed = {"crypto", "png16", "onig", "onnxruntime", "stdc++", "m", "gcc_s", "c", "pthread"}
    assert needed <= allowed | {"ld-linux-x86-64", "dl"} and not re.search("python|torch", read)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    promised = set(
        re.findall(r"^SSD_API .*?(ssd_\w+)\(", (HEADERS / "ssd_runtime.h").read_text(), re.M)
    )
    assert exported == promised, "nothing else, not even templates of the C++ library"


@pytest.mark.slow
def test_a_debian_package_that_brings_onnxruntime(build: Builds, tmp_path: Path) -> None:
    need("cpack", "dpkg-deb")
    configured = build.configure("package", "-DSSD_RUNTIME_BUNDLE_ONNXRUNTIME=ON")
    if configured.returncode:
        pytest.skip(one_line(configured))
    folder = build.folder / "package"
    build.compile(folder)
    packed = run(["cpack", "-G", "DEB", "-B", tmp_path], cwd=folder)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (package,) = tmp_path.glob("*.deb")
    fields = run(["dpkg-deb", "-f", package]).stdout
    assert "Package: libssd-runtime-dev" in fields and "Version: 0.1.0" in fields
    unpacked = run(["dpkg-deb", "-x", package, tmp_path / "root"])
    assert unpacked.returncode == 0
    library = next((tmp_path / "root").rglob("libssd_runtime.so.0"))
    assert (library.parent / "ssd_runtime" / "libonnxruntime.so.1").is_file()
    loaded = run(["ldd", library], env={"PATH": os.environ["PATH"]}).stdout
    assert str(library.parent / "ssd_runtime" / "libonnxruntime.so.1") in loaded


@pytest.mark.slow
def test_clang_compiles_it_without_a_warning(build: Builds) -> None:
    need("clang++")
    compiler = re.search(
        r"CMAKE_CXX_COMPILER:.*=(.*)", (by_clang(build) / "CMakeCache.txt").read_text()
    )
    assert compiler[1].endswith("clang++")


@pytest.mark.slow
def test_a_build_without_a_tokenizer_takes_ids(
    build: Builds, bundles: Bundles, tmp_path: Path
) -> None:
    bare = build("no-tokenizer", "-DSSD_RUNTIME_TOKENIZER=OFF")
    bundle = bundles("ssd-auto")
    encoder = prompt_encoder(bundle)
    ids = encoder.encode([PROMPT], 64).ids[:1].tolist()
    text, numbers = run_cases(
        bare,
        [{"bundle": str(bundle), "prompts": [PROMPT]}, {"bundle": str(bundle), "ids": ids}],
        tmp_path,
    )
    assert text.facts["error"].startswith("this ssd_runtime was built without a tokenizer")
    assert numbers.facts["images"] == 1
