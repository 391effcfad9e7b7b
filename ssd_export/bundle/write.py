"""Writing a bundle: whole or absent, replaced only by one that is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssd_export.bundle.config import CONFIG, leftover_of
from ssd_export.bundle.config_checks import check_files
from ssd_export.bundle.config_reader import read_config
from ssd_export.bundle.hashes import HashMemory
from ssd_export.bundle.manifest import MANIFEST, FileEntry, write_manifest
from ssd_export.bundle.swap import swap
from ssd_export.errors import UserError
from ssd_export.files import beside, disk_errors, is_disk_full
from ssd_export.os_errors import check_utf8, os_error

JOURNAL = "journal.jsonl"  # of an unfinished export (export/journal.py)
OTHER_OUT = "choose another folder with --out"


@contextmanager
def write_bundle(target: Path, force: bool, unfinished: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside the target; when the block ends it gets its manifest and becomes
    the target.

    Whatever ends the block otherwise (an error, Ctrl-C) leaves nothing, and an old bundle
    untouched. With force an old bundle is replaced, once the new one is complete.
    Args: unfinished: the folder to write in, new or left by an earlier call. It then stays where
    Ctrl-C, a signal or a full disk ends the block, so that a later call can go on; its file JOURNAL
    never becomes part of the bundle.
    Raises: UserError, before the block runs, for a target in the way or not writable; then for a
    full disk.
    """
    target = _checked_target(target, force)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    complete = keep = False
    folder: Path | None = None
    try:
        folder = _make_folder(
            beside(target, "partial") if unfinished is None else unfinished, target
        )
        with disk_errors(target, OTHER_OUT):
            try:
                yield folder
            except (KeyboardInterrupt, SystemExit, OSError) as error:
                stopped = not isinstance(error, OSError) or is_disk_full(error)
                keep = unfinished is not None and stopped
                raise
            _finish(folder, target, force)
            complete = True
    finally:
        if not (complete or keep):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                for parent in new_parents:
                    parent.rmdir()


def check_target(target: Path, force: bool) -> None:
    """Raises UserError where write_bundle would refuse the target."""
    _checked_target(target, force)


def _checked_target(target: Path, force: bool) -> Path:
    """The target, links followed, if a bundle may be written there."""
    try:
        target = target.resolve()
        check_utf8(target)
        left = leftover_of(target)
        if left is not None and not target.exists():
            raise UserError(
                f"{left} is an earlier bundle, left by an export that was killed: rename it to"
                f" {target}, or delete it"
            )
        if not target.exists():
            return target
        if not target.is_dir():
            raise UserError(f"{target} is a file; choose a folder with --out")
        if not any(target.iterdir()):
            return target
        is_bundle = (target / CONFIG).is_file() and (target / MANIFEST).is_file()
    except OSError as error:
        raise os_error(error, "write to", target, OTHER_OUT) from error
    except (RuntimeError, ValueError) as error:  # a circle of links, a null byte
        raise UserError(f"cannot write to {str(target)!r} ({error}); {OTHER_OUT}") from error
    if not force:
        raise UserError(
            f"{target} exists; replace it with --force, or choose another folder with --out"
        )
    if not is_bundle:
        raise UserError(
            f"{target} exists and is not a bundle, so --force does not replace it; choose another"
            " --out"
        )
    return target


def _make_folder(folder: Path, target: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(error, "write", target, OTHER_OUT) from error
    return folder


def _finish(folder: Path, target: Path, force: bool) -> None:
    """Writes the manifest and makes the folder the target."""
    config = read_config(folder, f"the writer of a bundle left no {CONFIG}")
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    files = {name: FileEntry.of(folder / name) for name in names if name != JOURNAL}
    check_files(config, files, str(folder))
    write_manifest(folder, files)
    (folder / JOURNAL).unlink(missing_ok=True)
    _checked_target(target, force)  # something may have come into being there meanwhile
    if target.exists() and any(target.iterdir()):
        swap(folder, target)
    else:
        with suppress(FileNotFoundError):
            target.rmdir()
        folder.replace(target)
    memory = HashMemory()
    for name, entry in files.items():
        memory.note(target / name, entry.sha256)
    memory.save()
