"""Putting a finished folder in the place of a bundle: the earlier bundle goes, what else was in its
folder stays.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ssd_export.bundle.config import CONFIG
from ssd_export.bundle.manifest import MANIFEST, read_manifest
from ssd_export.errors import UserError
from ssd_export.files import beside

AT_FDCWD = -100
RENAME_EXCHANGE = 2
LEFTOVERS = (".adding-", ".building-", f"{MANIFEST}.partial-")  # of killed processes
# Of a bundle whose manifest cannot be read: what every bundle has.
USUAL_FILES = ("config.json", "head_map.json", "onnx/weights.safetensors", "tokenizer.json")
USUAL_FOLDERS = ("engines/", "onnx/", "reports/")
ENDINGS = (".cache", ".engine", ".json", ".onnx", ".so")  # of what stands in USUAL_FOLDERS


def swap(folder: Path, target: Path) -> None:
    """Makes `folder` the target, which holds an earlier bundle: at once where the system can, so
    that no moment is without a bundle.

    Files of the target that are not its bundle's (a README of a hub, notes) are moved into the new
    one. Should that fail, they stay in a folder `<target>.old-*`, which nothing deletes.
    """
    old = beside(target, "old")
    folder.replace(old)
    try:
        exchanged = _exchange(old, target)
    except BaseException:
        old.replace(folder)
        raise
    if not exchanged:
        old.replace(folder)
        target.replace(old)
        try:
            folder.replace(target)
        except BaseException:
            old.replace(target)
            raise
    # From here on `old` holds the earlier bundle.
    _move_foreign(old, target)


def _move_foreign(old: Path, target: Path) -> None:
    """Moves what is not the bundle's from the earlier folder to the new one, and deletes the rest
    once nothing foreign is left in it.
    """
    own = own_files(old)
    for path in list(_everything(old)):
        name = path.relative_to(old).as_posix()
        if name in own or name.startswith(LEFTOVERS):
            continue
        place = target / name
        if os.path.lexists(place):
            place = beside(place, "earlier")
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(old, ignore_errors=True)


def own_files(folder: Path) -> set[str]:
    """The names of the files that are a bundle's."""
    try:
        return {MANIFEST, *read_manifest(folder).files}
    except UserError:
        names = (path.relative_to(folder).as_posix() for path in _everything(folder))
        usual = {CONFIG, MANIFEST, *USUAL_FILES}
        return {
            name
            for name in names
            if name in usual or (name.startswith(USUAL_FOLDERS) and name.endswith(ENDINGS))
        }


def _everything(folder: Path) -> Iterator[Path]:
    """Every file, link or other thing in a folder that is no folder itself; links are not
    followed.
    """
    for root, folders, files in os.walk(folder):
        for name in files:
            yield Path(root, name)
        for name in folders:
            if Path(root, name).is_symlink():
                yield Path(root, name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    with suppress(AttributeError, OSError):  # a C library without it
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        paths = os.fsencode(one), os.fsencode(other)
        return rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0
    return False
