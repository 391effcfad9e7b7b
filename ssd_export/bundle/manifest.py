"""The manifest.json of a bundle: size and sha256 of every file.

    {"schema_version", "files": {"onnx/decode_step.onnx": {"bytes", "sha256"}, ...}}

The hash of a bundle is the sha256 of what `sha256sum` prints for the fixed files, sorted by name as
bytes ("<sha256>  <name>\\n"), so that an engine or a report that is added later leaves it as it is.
A file that the manifest does not name (a README from a hub, say) is never read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ssd_export.bundle.config import CONFIG, EXPORT_AGAIN, SCHEMA_VERSION
from ssd_export.bundle.hashes import sha256
from ssd_export.errors import UserError
from ssd_export.files import read_file, replace_text
from ssd_export.os_errors import os_error
from ssd_export.typed_json import MAX_BYTES, parse_json, to_json

MANIFEST = "manifest.json"
ADDED_LATER = ("engines/", "reports/")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """Size and content of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file on disk; reads all of it. Raises: OSError."""
        return cls(path.stat().st_size, sha256(path))


Files = Mapping[str, FileEntry]


@dataclass(frozen=True)
class Manifest:
    """The entries of manifest.json. files: by name relative to the bundle, with forward slashes,
    sorted.
    """

    schema_version: int
    files: dict[str, FileEntry]

    @classmethod
    def of(cls, files: Files) -> Manifest:
        """A manifest of this schema version, its files in order."""
        return cls(SCHEMA_VERSION, dict(sorted(files.items())))


def read_manifest(folder: Path) -> Manifest:
    """The manifest, to the byte as it is written: safe names, a size and a sha256 for each file.

    Raises: UserError where it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        content = read_file(path, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"bundle {folder}: {MANIFEST} is missing; {EXPORT_AGAIN}") from None
    except OSError as error:
        raise os_error(error, "read", path) from error
    manifest = parse_json(content, Manifest, f"{path} is damaged", EXPORT_AGAIN)
    for name, entry in manifest.files.items():
        if not is_inside(name) or entry.bytes < 0 or not SHA256.fullmatch(entry.sha256):
            raise UserError(
                f"{path} is damaged: its entry of {name!r:.200} names no file of this"
                f" bundle; {EXPORT_AGAIN}"
            )
    if CONFIG not in manifest.files or content != to_json(Manifest.of(manifest.files)).encode():
        raise UserError(f"{path} is damaged; {EXPORT_AGAIN}")
    return manifest


def write_manifest(folder: Path, files: Files) -> Manifest:
    """The manifest that now stands in the folder, replaced in one step."""
    manifest = Manifest.of(files)
    replace_text(folder / MANIFEST, to_json(manifest))
    return manifest


def bundle_hash(files: Files) -> str:
    """The hash of a bundle, as this module's docstring defines it."""
    fixed = sorted((name for name in files if not name.startswith(ADDED_LATER)), key=str.encode)
    listing = "".join(f"{files[name].sha256}  {name}\n" for name in fixed)
    return hashlib.sha256(listing.encode()).hexdigest()


def is_inside(name: str) -> bool:
    """Whether a manifest's name stays inside the bundle: relative, forward slashes, no `..`."""
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return (
        plain and bool(parts) and name == "/".join(parts) and ".." not in parts and parts[0] != "/"
    )
