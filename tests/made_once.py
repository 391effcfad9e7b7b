"""Folders that are expensive to fill, filled once a run however many workers it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # Windows: each worker makes its folders itself
    fcntl = None  # type: ignore[assignment]

DONE = ".made"


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that the workers of this run share; without workers, the run's."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ and fcntl else base


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a lock file, however long another worker takes; it ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which `make` has filled: here, or in the worker that came first.

    What `make` raises, a skip too, is raised; the next one who asks tries again in the same folder.
    """
    with held(folder.with_name(f"{folder.name}.lock")):
        if not (folder / DONE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder)
            (folder / DONE).touch()
    return folder
