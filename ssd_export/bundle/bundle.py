"""An open bundle: one folder that every runtime reads, every file checked by its sha256.

ssd_config.json   what the bundle is: bundle/config.py
manifest.json     size and sha256 of every file: bundle/manifest.py
engines/ reports/ added later by other verbs (bundle/added.py), and checked when they are used:
                  a bundle that was copied without them is whole for everything else
everything else   graphs, weights, tokenizer, head map: fixed once it is written
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ssd_export.bundle.added import add_files
from ssd_export.bundle.config import CONFIG, EXPORT_AGAIN, BundleConfig
from ssd_export.bundle.config_checks import check_files
from ssd_export.bundle.config_reader import parse_config, read_config_text
from ssd_export.bundle.hashes import HashMemory
from ssd_export.bundle.manifest import (
    ADDED_LATER,
    MANIFEST,
    FileEntry,
    Files,
    Manifest,
    bundle_hash,
    read_manifest,
)
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import NOT_THERE, check_utf8, os_error
from ssd_export.typed_json import MAX_BYTES

OPENINGS = 5  # of a bundle that is replaced or added to while it is opened
CHECKING = "checking the bundle"
Stamp = tuple[int, int, int, int]  # device, inode, size, time of the last change of the content
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose fixed files were all there and unchanged when it was opened.

    path: as it was given, for messages; folder: the same, wherever the process goes to.
    stamps: which files were checked, so that others in their place are noticed.
    """

    path: Path
    config: BundleConfig
    manifest: Manifest
    hash: str
    folder: Path
    stamps: Mapping[str, Stamp] = field(repr=False, compare=False)

    @property
    def files(self) -> Files:
        """Size and sha256 of every file, by its name relative to the bundle, with forward
        slashes.
        """
        return self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names.

        Raises: UserError if it names no such file, if the bundle was replaced, changed or deleted
        since it was opened, and for a file added later that is missing or changed.
        """
        if name not in self.files:
            raise UserError(f"bundle {self.path} has no {name}; {EXPORT_AGAIN}")
        if name.startswith(ADDED_LATER):
            memory = HashMemory()
            _check_file(self.folder, name, self.files[name], memory, self.path)
            memory.save()
        else:
            self._check_unchanged(name)
        return self.folder / name

    @contextmanager
    def using(self, name: str, *others: str) -> Iterator[Path]:
        """The path of a file for a library that opens it, and the others beside it, by itself; what
        it opened is what was checked.

        Raises: UserError as `file`, at the end of the block too.
        """
        for other in others:
            self.file(other)
        path = self.file(name)
        try:
            yield path
        finally:  # a library that fails may have met another file
            for used in (name, *others):
                self.file(used)

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises: UserError as `file`, and for one that cannot be read
        or has more than 64 MiB.
        """
        path = self.file(name)
        try:
            content = read_file(path, MAX_BYTES)
        except OSError as error:
            raise os_error(error, "read", path) from error
        if hashlib.sha256(content).hexdigest() != self.files[name].sha256:
            raise self._replaced(name)
        return content

    def faults(self) -> list[str]:
        """Faults of files that were added later, one line a file."""
        found = []
        for name in self.files:
            if name.startswith(ADDED_LATER):
                try:
                    self.file(name)
                except UserError as error:
                    found.append(str(error))
        return found

    def add_files(
        self, files: Mapping[str, bytes | Path], instead_of: Collection[str] = ()
    ) -> Bundle:
        """The bundle with these files of engines/ or reports/ added, or replaced; on failure it is
        as it was.

        Args: files: content by name; a Path is moved (write it inside the bundle: the same disk).
        instead_of: names of files added earlier that go, where they are not among the new ones.
        Raises: UserError when the disk is full or not writable, or the bundle was replaced;
        ValueError for a name elsewhere.
        """
        manifest = add_files(self.folder, self.path, self.hash, files, instead_of)
        return Bundle(self.path, self.config, manifest, self.hash, self.folder, self.stamps)

    def _check_unchanged(self, name: str) -> None:
        try:
            found = _stamp((self.folder / name).stat())
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise os_error(error, "read", self.folder / name) from error
            found = None
        if found != self.stamps[name]:
            raise self._replaced(name)

    def _replaced(self, name: str) -> UserError:
        return UserError(
            f"bundle {self.path} was replaced, changed or deleted while it was open ({name} is not"
            " the file that was opened); open it again"
        )


def open_bundle(path: str | Path, progress: Progress = lambda stage, done, total: None) -> Bundle:
    """The bundle at path, every fixed file checked against the manifest.

    Args:
        path: the bundle's folder.
        progress: told the stage CHECKING in bytes.

    Raises:
        UserError: there is none, another version wrote it, or a file is missing or changed.
    """
    path = Path(path)
    for _ in range(OPENINGS):
        before = _state(path)
        try:
            return _open(path, progress)
        except UserError:
            if _state(path) == before:
                raise
    raise UserError(f"bundle {path} changes all the time; open it when its writer has ended")


def _open(path: Path, progress: Progress) -> Bundle:
    folder = Path.cwd() / path  # links stay as they are: a bundle may be swapped behind one
    check_utf8(folder)
    content = read_config_text(path)
    config = parse_config(content, str(path / CONFIG))
    manifest = read_manifest(path)
    check_files(config, manifest.files, str(path))
    if hashlib.sha256(content).hexdigest() != manifest.files[CONFIG].sha256:
        raise _changed(path, CONFIG)
    fixed = {
        name: entry for name, entry in manifest.files.items() if not name.startswith(ADDED_LATER)
    }
    memory, done = HashMemory(), 0
    total = sum(entry.bytes for entry in fixed.values())

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(CHECKING, done, total)

    progress(CHECKING, 0, total)
    stamps = {
        name: _check_file(folder, name, entry, memory, path, advance)
        for name, entry in fixed.items()
    }
    memory.save()
    return Bundle(path, config, manifest, bundle_hash(manifest.files), folder, stamps)


def _check_file(
    folder: Path,
    name: str,
    entry: FileEntry,
    memory: HashMemory,
    shown: Path,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Stamp:
    """The stamp of a file that is what the manifest says. Raises: UserError for any other."""
    file, way_out = folder / name, _way_out(name, shown)
    try:
        before = _stamp(file.stat())
        size = before[2]
        if size != entry.bytes:
            raise UserError(
                f"bundle {shown}: {name} has {size} bytes, the manifest says {entry.bytes};"
                f" {way_out}"
            )
        if memory.sha256(file, advance) != entry.sha256 or _stamp(file.stat()) != before:
            raise _changed(shown, name)
    except OSError as error:
        if error.errno in NOT_THERE:
            raise UserError(f"bundle {shown}: {name} is missing; {way_out}") from None
        raise os_error(error, "read", file) from error
    return before


def _changed(shown: Path, name: str) -> UserError:
    return UserError(
        f"bundle {shown}: {name} was changed (its sha256 is not the manifest's);"
        f" {_way_out(name, shown)}"
    )


def _way_out(name: str, shown: Path) -> str:
    if name.startswith("engines/"):
        return f"build the engines again: ssd-export build-engine --bundle {shown}"
    if name.startswith("reports/"):
        return "run the verb that wrote it again"
    return EXPORT_AGAIN


def _stamp(status: os.stat_result) -> Stamp:
    # Without ctime, which a hard link or chmod changes: bench links the weights of an open bundle.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _state(path: Path) -> Stamp | None:
    """The stamp that every writer of a bundle changes."""
    try:
        return _stamp((path / MANIFEST).stat())
    except OSError:
        return None
