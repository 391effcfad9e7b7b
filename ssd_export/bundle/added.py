"""Adding engines and reports to a bundle, by several processes at once if need be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from ssd_export.bundle.manifest import (
    ADDED_LATER,
    MANIFEST,
    FileEntry,
    Manifest,
    bundle_hash,
    is_inside,
    read_manifest,
    write_manifest,
)
from ssd_export.errors import UserError
from ssd_export.files import disk_errors
from ssd_export.locks import YOUNG_SECONDS, locked, scratch_folder


def add_files(
    folder: Path,
    shown: Path,
    bundle: str,
    files: Mapping[str, bytes | Path],
    instead_of: Collection[str],
) -> Manifest:
    """The manifest of the bundle in `folder` with these files added, as Bundle.add_files says.

    A file is never in its place while the manifest says something else of it, so whatever
    interrupts this leaves a bundle that opens: the manifest forgets the old, the files move, it
    names the new. Files are staged and hashed before the lock is taken, which is held for
    milliseconds.
    Args: shown: the path for messages; bundle: the hash of the bundle that the files belong to.
    """
    for name in {*files, *instead_of}:
        if not (name.startswith(ADDED_LATER) and is_inside(name)):
            raise ValueError(
                f"{name}: only files under {' and '.join(ADDED_LATER)} are added to a bundle"
            )
    gone = {*instead_of} - {*files}
    with (
        disk_errors(shown, "make it writable, or copy the bundle to another disk"),
        scratch_folder(_there(folder, shown), ".adding-") as scratch,
    ):
        staged = {name: scratch / str(index) for index, name in enumerate(files)}
        for name, content in files.items():
            if isinstance(content, bytes):
                staged[name].write_bytes(content)
            else:
                shutil.move(content, staged[name])
        new = {name: FileEntry.of(path) for name, path in staged.items()}
        with locked(folder):
            return _put(folder, shown, bundle, staged, new, gone)


def _put(
    folder: Path,
    shown: Path,
    bundle: str,
    staged: Mapping[str, Path],
    new: Mapping[str, FileEntry],
    gone: Collection[str],
) -> Manifest:
    """Moves the staged files to their places, under the bundle's lock."""
    _remove_partial_manifests(folder)
    before = read_manifest(folder).files
    if bundle_hash(before) != bundle:
        raise UserError(
            f"bundle {shown} was replaced meanwhile: what was made from the earlier one is not"
            " added to it; run this again"
        )
    kept = {name: entry for name, entry in before.items() if name not in new and name not in gone}
    if kept.keys() != before.keys():
        write_manifest(folder, kept)
    for name, path in staged.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(folder / name)
    manifest = write_manifest(folder, {**kept, **new})
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    return manifest


def _there(folder: Path, shown: Path) -> Path:
    if not (folder / MANIFEST).exists():
        raise UserError(f"bundle {shown} was deleted while it was open; export it again")
    return folder


def _remove_partial_manifests(folder: Path) -> None:
    """Removes what a killed process left: nobody else writes a manifest under the lock."""
    for path in folder.glob(f"{MANIFEST}.partial-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                path.unlink()
