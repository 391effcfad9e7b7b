"""An open bundle: one folder that every runtime reads, every file checked by its sha256.

ssd_config.json   what the bundle is: bundle/config.py
manifest.json     size and sha256 of every file: bundle/manifest.py
engines/ reports/ added later by other verbs: Bundle.add_files
everything else   graphs, weights, tokenizer, head map: fixed once it is written
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ssd_export.bundle.config import EXPORT_AGAIN, BundleConfig
from ssd_export.bundle.config_checks import check_files
from ssd_export.bundle.config_reader import read_config
from ssd_export.bundle.hashes import HashMemory
from ssd_export.bundle.manifest import (
    ADDED_LATER,
    FileEntry,
    Files,
    Manifest,
    bundle_hash,
    is_inside,
    read_manifest,
    write_manifest,
)
from ssd_export.bundle.write import disk_errors
from ssd_export.errors import UserError
from ssd_export.files import read_file, reason
from ssd_export.os_errors import os_error
from ssd_export.typed_json import MAX_BYTES


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all there and unchanged when it was opened."""

    path: Path
    config: BundleConfig
    manifest: Manifest
    hash: str

    @property
    def files(self) -> Files:
        """Size and sha256 of every file, by its name relative to the bundle, with forward slashes."""
        return self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names. Raises: UserError if it names no such
        file.
        """
        if name not in self.files:
            raise UserError(f"bundle {self.path} has no {name}; {EXPORT_AGAIN}")
        return self.path / name

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises: UserError as file, and for one that cannot be read
        or has more than 64 MiB.
        """
        path = self.file(name)
        try:
            return read_file(path, MAX_BYTES)
        except OSError as error:
            raise os_error(error, "read", path) from error

    def add_files(
        self, files: Mapping[str, bytes | Path], instead_of: Collection[str] = ()
    ) -> Bundle:
        """The bundle with these files of engines/ or reports/ added, or replaced; on failure it is
        as it was.

        Args: files: content by name; a Path is moved (write it inside the bundle: the same disk).
        instead_of: names
            of files added earlier that go, where they are not among the new ones.
        Raises: UserError when the disk is full or not writable, ValueError for a name elsewhere.

        A file is never in its place while the manifest says something else of it, so whatever
        interrupts this leaves a bundle that opens: the manifest forgets the old, the files move, it
        names the new.
        """
        for name in {*files, *instead_of}:
            if not (name.startswith(ADDED_LATER) and is_inside(name)):
                raise ValueError(
                    f"{name}: only files under {' and '.join(ADDED_LATER)} are added to a bundle"
                )
        gone = {*instead_of} - {*files}
        with (
            disk_errors(self.path),
            tempfile.TemporaryDirectory(prefix=".adding-", dir=self.path) as folder,
        ):
            staged = {name: Path(folder) / str(index) for index, name in enumerate(files)}
            for name, content in files.items():
                if isinstance(content, bytes):
                    staged[name].write_bytes(content)
                else:
                    shutil.move(content, staged[name])
            new = {name: FileEntry.of(path) for name, path in staged.items()}
            kept = {
                name: entry
                for name, entry in read_manifest(self.path).files.items()
                if name not in new and name not in gone
            }
            write_manifest(self.path, kept)
            for name, path in staged.items():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.path / name)
            manifest = write_manifest(self.path, {**kept, **new})
            for name in gone:
                (self.path / name).unlink(missing_ok=True)
        return Bundle(self.path, self.config, manifest, bundle_hash(manifest.files))


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at path, every file checked against the manifest.

    Raises:
        UserError: there is none, a later version wrote it, or a file is missing or changed.
    """
    path = Path(path)
    config = read_config(path)
    manifest = read_manifest(path)
    check_files(config, manifest.files, str(path))
    memory = HashMemory()
    for name, entry in manifest.files.items():
        _check_file(path, name, entry, memory)
    memory.save()
    return Bundle(path, config, manifest, bundle_hash(manifest.files))


def _check_file(path: Path, name: str, entry: FileEntry, memory: HashMemory) -> None:
    """Raises: UserError if the file is not what the manifest says."""
    file = path / name
    try:
        size = file.stat().st_size
        if size != entry.bytes:
            raise UserError(
                f"bundle {path}: {name} has {size} bytes, the manifest says {entry.bytes};"
                f" {EXPORT_AGAIN}"
            )
        is_unchanged = memory.sha256(file) == entry.sha256
    except FileNotFoundError:
        raise UserError(f"bundle {path}: {name} is missing; {EXPORT_AGAIN}") from None
    except OSError as error:
        raise UserError(
            f"bundle {path}: {name} cannot be read ({reason(error)}); {EXPORT_AGAIN}"
        ) from error
    if not is_unchanged:
        raise UserError(
            f"bundle {path}: {name} was changed (its sha256 is not the manifest's); {EXPORT_AGAIN}"
        )
