"""What `import ssd_export` offers, and what it loads: as little as what is used of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ssd_export
from ssd_export.version import TOOL_VERSION

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "transformers", "rich", "PIL")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_public_name_is_there_and_documented() -> None:
    assert ssd_export.__version__ == TOOL_VERSION
    for name in ssd_export.__all__:
        assert name in dir(ssd_export)
        assert getattr(ssd_export, name).__doc__
    assert set(ssd_export.PLACES) | {"__version__"} == set(ssd_export.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ImageGenerators'"):
        ssd_export.ImageGenerators  # noqa: B018


def test_types_are_shipped() -> None:
    assert (Path(ssd_export.__file__).parent / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import ssd_export; ssd_export.__version__; ssd_export.UserError", HEAVY),
        ("from ssd_export import ImageGenerator, open_bundle", ("torch", "onnx", "transformers")),
    ],
)
def test_only_what_is_asked_for_is_loaded(code: str, absent: tuple[str, ...]) -> None:
    done = python("-c", f"{code}; import sys; print(*sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert not set(absent) & set(done.stdout.split())


def test_python_m_is_the_command() -> None:
    done = python("-m", "ssd_export", "--version")
    assert done.returncode == 0 and done.stdout == f"ssd-export, version {TOOL_VERSION}\n"
    done = python("-m", "ssd_export", "generate", "x", "--bundle", "/nowhere/at/all")
    assert done.returncode == 1 and done.stderr.startswith("error: no bundle at /nowhere/at/all")
