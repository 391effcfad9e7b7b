"""What goes wrong outside the program is one line with the way out."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssd_export.cli.main import VERBS
from ssd_export.errors import UserError
from ssd_export.extras import EXTRAS, check_extras

ROOT = Path(__file__).parents[2]
Run = Callable[..., SimpleNamespace]


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "error, parts",
    [
        (missing("matplotlib.pyplot"), ["matplotlib is not installed for", "ssd-export[export]"]),
        (missing("onnxruntime"), ["onnxruntime is not installed", "ssd-export[ort]"]),
        (missing("tokenizers"), ["tokenizers is not installed", "pip install ssd-export"]),
        (
            ImportError("libGL.so.1: cannot open shared object file\nmore", name="torch._C"),
            ["torch cannot be loaded (libGL.so.1: cannot open", "install it again"],
        ),
        (
            OSError(errno.EIO, "Input/output error", "x.bin"),
            ["x.bin", "the disk or its connection"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/b"), ["/b", "permissions"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested deeper", "JSON file"]),
        (MemoryError("Unable to allocate 8 GiB"), ["out of memory (Unable to", "smaller --batch"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_with_the_way_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, parts: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ssd_export.bundle.resolve_bundle", fail)
    done = run("inspect")
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize(
    "error", [missing("ssd_export.gone"), ZeroDivisionError("a bug")], ids=["ours", "bug"]
)
def test_a_fault_of_this_program_is_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ssd_export.bundle.resolve_bundle", fail)
    with pytest.raises(type(error)):
        run("inspect")


def test_a_reader_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """As `ssd-export inspect | head -0`: it ends without a word."""
    read, write = os.pipe()
    os.close(read)
    code = (
        "import click; from ssd_export.cli import main as m\n"
        "m.importlib.import_module('ssd_export.cli.inspect').command.callback = "
        "lambda **asked: [click.echo('x' * 9999) for _ in range(99)]\n"
        "m.main(['inspect'])"
    )
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name in ("export", "ort", "bench")])
def test_a_missing_extra_names_itself(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_extras([extra])
    for module in EXTRAS[extra]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=rf"needs {module}.*ssd-export\[{extra}\]"):
                check_extras([extra])


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("inspect",)])
def test_on_a_board_every_verb_says_what_it_lacks(verb: str, tmp_path: Path) -> None:
    """Without torch, onnx and the like: one line, never a traceback."""
    needed = {
        "generate": ["x"],
        "prompts": ["x"],
        "embed-prompts": ["x", "--encoder", "d"],
        "build-engine": ["--dry-run"],
        "package": ["--docker", "d"],
    }
    arguments = needed.get(verb, [])
    code = (
        "import sys\n"
        f"for name in {[*EXTRAS['export'], 'matplotlib', 'huggingface_hub', 'transformers']}:\n"
        "    sys.modules[name] = None\n"
        "from ssd_export.cli.main import main\n"
        f"main({[verb, *arguments]})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1
    if verb in ("plan", "export", "calibrate", "sweep", "bench", "verify", "train-demo"):
        assert "torch" in done.stderr and "ssd-export[export]" in done.stderr
