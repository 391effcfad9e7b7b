"""A full disk, a folder that cannot be written, and the same command twice at once: one line, and a
result that is whole or absent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interruption.verbs import VERBS, WritingVerb, write_inputs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds for a command, on the busiest machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that a test may fill; `mount -o remount` changes it."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mounted("tmpfs", "size=128m", place):
        pytest.skip("needs root, to mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def mounted(kind: str, options: str, place: Path) -> bool:
    if os.name != "posix" or os.geteuid() != 0:
        return False
    command = ["mount", "-t", kind, "-o", options, kind, place]
    return subprocess.run(command, capture_output=True).returncode == 0


def start(verb: WritingVerb, inputs: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "cli.py", *map(str, verb.arguments(inputs, folder))]
    return subprocess.Popen(
        command,
        cwd=inputs,
        env=os.environ | {"XDG_CACHE_HOME": str(inputs / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(process: subprocess.Popen[str], *words: str) -> None:
    """It ended with one line that says why."""
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert any(word in said for word in words), said


@pytest.mark.parametrize("name", ("export", "build-engine"))
def test_a_full_disk(name: str, inputs: Path, small_disk: Path) -> None:
    verb = VERBS[name]
    verb.prepare(inputs, small_disk)
    before = verb.digest(small_disk)
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(filler, bytes(1 << 12))
    os.close(filler)
    refused(start(verb, inputs, small_disk), "no space left", "of disk")
    assert verb.digest(small_disk) == before
    (small_disk / "filler").unlink()
    done = start(verb, inputs, small_disk)
    _, said = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, said
    assert verb.digest(small_disk) is not None


@pytest.mark.parametrize("name", ("calibrate", "sweep"))
def test_a_folder_that_cannot_be_written(name: str, inputs: Path, small_disk: Path) -> None:
    verb = VERBS[name]
    verb.prepare(inputs, small_disk)
    before = verb.digest(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(start(verb, inputs, small_disk), "read-only", "Read-only")
    assert verb.digest(small_disk) == before


@pytest.mark.parametrize("name", ("calibrate", "build-engine"))
def test_the_same_command_twice_at_once(name: str, inputs: Path, tmp_path: Path) -> None:
    """Both may end well, or one is refused in a line; the result is that of one."""
    verb = VERBS[name]
    verb.prepare(inputs, tmp_path)
    both = [start(verb, inputs, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert 0 in [process.returncode for process in both], said
    for process, text in zip(both, said):
        assert process.returncode in (0, 1) and "Traceback" not in text, text
        assert process.returncode == 0 or "error: " in text, text
    assert verb.digest(tmp_path) is not None
