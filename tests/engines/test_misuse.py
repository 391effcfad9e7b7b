"""Misuse of the C interface, awkward moments, threads: as compiled, and under the sanitizers.

engines/tests/misuse.cpp has the tests; each prints its name and whether it passed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.builds import Builds, run

pytestmark = pytest.mark.slow

FEW_MODELS = {"SSD_MODELS": "20"}


def run_misuse(build: Path, bundle: Path, folder: Path, *names: str, **environment: str) -> None:
    """Runs the tests; what a sanitizer finds makes the run fail."""
    command = [build / "tests" / "ssd_misuse", bundle, *names]
    ran = run(command, cwd=folder, env={**os.environ, **environment})
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, "\n".join(lines[-20:]) + ran.stderr[-6000:]
    listed = run([build / "tests" / "ssd_misuse"]).stdout.split()
    assert [f"passed {name}" for name in listed if not names or name in names] == lines


@pytest.mark.slow
def test_misuse(build: Builds, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    run_misuse(build("release"), bundles("ssd-auto"), tmp_path)
    from PIL import Image

    image = Image.open(tmp_path / "ssd_misuse.png")
    assert image.size == (2, 2) and image.getpixel((1, 0)) == (0, 255, 0)
    assert image.text["prompt"] == "été"
    assert not list(tmp_path.glob("*.partial*"))
