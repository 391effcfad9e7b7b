"""The linter's rules of pyproject.toml hold everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ruff", reason="needs ruff: pip install ssd-export[test]")


def test_ruff_finds_nothing() -> None:
    folders = ("ssd_export", "tests", "plugins", "engines", "cli.py")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
        *folders,
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
