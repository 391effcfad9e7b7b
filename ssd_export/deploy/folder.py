"""Folders that are there whole or not at all, and a bundle's copy in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.bundle.manifest import MANIFEST
from ssd_export.errors import UserError
from ssd_export.files import beside, disk_errors, make_folder
from ssd_export.os_errors import find


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end.

    Args: force: the folder that is there goes, once the new one is complete.
    Raises: UserError where something is there and is not to go, or the disk is full.
    """
    if find(target, "write") is not None and not force:
        raise UserError(f"{target} exists; choose another place, or --force to replace it")
    make_folder(target.parent)
    partial = beside(target, "partial")
    try:
        with disk_errors(target):
            partial.mkdir()
            yield partial
            if target.exists():
                old = beside(target, "old")
                target.replace(old)
                partial.replace(target)
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            else:
                partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copies the files that the manifest names, and the manifest."""
    for name in (*bundle.manifest.files, MANIFEST):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, path)
