"""The bundle: one folder that every runtime reads, whole or absent, every file vouched for by its
sha256.

    ssd_config.json   schema_version, tool_version and what the exporter puts there: write_config
    manifest.json     {"schema_version", "files": {"onnx/decode_step.onnx": {"bytes", "sha256"},
    ...}} engines/ reports/ added later by other verbs: Bundle.add_files
    everything else   graphs, weights, tokenizer, head map: fixed once it is written

The hash of a bundle is the sha256 of what `sha256sum` prints for the fixed files, sorted by name as
bytes ("<sha256>  <name>\\n"), so that an engine or a report that is added later leaves it as it is.
A file that the manifest does not name (a README from a hub, say) is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ssd_export.errors import UserError

SCHEMA_VERSION = 1
TOOL_VERSION = "0.1.0"
CONFIG, MANIFEST = "ssd_config.json", "manifest.json"
JOURNAL = "journal.jsonl"  # of an unfinished export (export/journal.py)
ADDED_LATER = ("engines/", "reports/")
LATEST = Path("bundles") / ".latest"
ALWAYS_HASHED_BYTES = (
    64 << 20
)  # a smaller file is hashed each time, a larger one when its time stamps change
EXPORT_AGAIN = "export it again with --force, or copy it again from where it came"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all there and unchanged when it was opened."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    hash: str

    @property
    def files(self) -> Files:
        """{"bytes", "sha256"} of every file, by its name relative to the bundle, with forward
        slashes.
        """
        return self.manifest["files"]

    def file(self, name: str) -> Path:
        """The path of a file that the manifest vouches for. Raises: UserError if it names no such
        file.
        """
        if name not in self.files:
            raise UserError(f"bundle {self.path} has no {name}; {EXPORT_AGAIN}")
        return self.path / name

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
            if not (name.startswith(ADDED_LATER) and _is_inside(name)):
                raise ValueError(
                    f"{name}: only files under {' and '.join(ADDED_LATER)} are added to a bundle"
                )
        gone = {*instead_of} - {*files}
        with (
            _disk_errors(self.path),
            tempfile.TemporaryDirectory(prefix=".adding-", dir=self.path) as folder,
        ):
            staged = {name: Path(folder) / str(index) for index, name in enumerate(files)}
            for name, content in files.items():
                if isinstance(content, bytes):
                    staged[name].write_bytes(content)
                else:
                    shutil.move(content, staged[name])
            new = {name: _describe(path) for name, path in staged.items()}
            kept = {
                name: entry
                for name, entry in _read_manifest(self.path)["files"].items()
                if name not in new and name not in gone
            }
            _write_manifest(self.path, kept)
            for name, path in staged.items():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, self.path / name)
            manifest = _write_manifest(self.path, {**kept, **new})
            for name in gone:
                (self.path / name).unlink(missing_ok=True)
        return Bundle(self.path, self.config, manifest, _bundle_hash(manifest["files"]))


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes ssd_config.json: the values, stamped with the versions of schema and tool."""
    stamped = {"schema_version": SCHEMA_VERSION, "tool_version": TOOL_VERSION, **values}
    (folder / CONFIG).write_text(json.dumps(stamped, indent=1) + "\n", encoding="utf-8")


def weight_format(config: Mapping[str, Any]) -> str:
    """none, int8, int4 or fp8: how the layers' matrices are stored; bundles of before quantisation
    do not say.
    """
    return config.get("precision", {}).get("weights", "none")


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
            _beside(target, "partial") if unfinished is None else unfinished, target
        )
        with _disk_errors(target):
            try:
                yield folder
            except (KeyboardInterrupt, SystemExit, OSError) as error:
                stopped = not isinstance(error, OSError) or error.errno in DISK_IS_FULL
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
    """Raises: UserError where write_bundle would refuse the target."""
    _checked_target(target, force)


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at path, every file checked against the manifest.

    Raises: UserError when there is none, it was written for a later tool, or a file is missing or
    changed.
    """
    path = Path(path)
    config = _read_json(
        path,
        CONFIG,
        f"no bundle at {path}: make one with `ssd-export export`, or give --bundle DIR",
    )
    _check_schema(path, config)
    manifest = _read_manifest(path)
    known = _known_hashes()
    fresh: dict[str, str] = {}
    for name, entry in manifest["files"].items():
        _check_file(path, name, entry, known, fresh)
    if fresh:
        _remember_hashes({**known, **fresh})
    return Bundle(path, config, manifest, _bundle_hash(manifest["files"]))


def remember_latest(bundle_path: Path) -> None:
    """Notes the bundle as this folder's latest, in bundles/.latest. Raises: OSError if it
    cannot.
    """
    LATEST.parent.mkdir(exist_ok=True)
    bundle_path, home = bundle_path.resolve(), LATEST.parent.resolve()
    inside = bundle_path.is_relative_to(home)
    _replace_text(LATEST, f"{bundle_path.relative_to(home) if inside else bundle_path}\n")


def latest_bundle() -> Path | None:
    """The bundle that was exported last from this folder, or None; it may have been deleted
    since.
    """
    try:
        name = LATEST.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return LATEST.parent / name if name else None


def resolve_bundle(path: str | Path | None) -> Path:
    """The path given, else the latest bundle. Raises: UserError if there is no latest one."""
    if path is not None:
        return Path(path)
    latest = latest_bundle()
    if latest is None:
        raise UserError(
            "no bundle was exported from this folder yet: run `ssd-export export`, or give a"
            " bundle's path"
        )
    if not latest.is_dir():
        raise UserError(
            f"the latest bundle {latest} is gone: run `ssd-export export`, or give another bundle's"
            " path"
        )
    return latest


def _checked_target(target: Path, force: bool) -> Path:
    """The target, links followed, if a bundle may be written there."""
    try:
        target = target.resolve()
        if not target.exists():
            return target
        if not target.is_dir():
            raise UserError(f"{target} is a file; choose a folder with --out")
        if not any(target.iterdir()):
            return target
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write to {target} ({_reason(error)}); choose another folder with --out"
        ) from error
    if not force:
        raise UserError(
            f"{target} exists; replace it with --force, or choose another folder with --out"
        )
    if not ((target / CONFIG).is_file() and (target / MANIFEST).is_file()):
        raise UserError(
            f"{target} exists and is not a bundle, so --force does not replace it; choose another"
            " --out"
        )
    return target


def _make_folder(folder: Path, target: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({_reason(error)}); choose another folder with --out"
        ) from error
    return folder


def _finish(folder: Path, target: Path, force: bool) -> None:
    """Writes the manifest and renames folder to target."""
    config = _read_json(folder, CONFIG, f"the writer of a bundle left no {CONFIG}")
    _check_schema(folder, config)
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    files = {name: _describe(folder / name) for name in names if name != JOURNAL}
    _write_manifest(folder, files)
    (folder / JOURNAL).unlink(missing_ok=True)
    if target.exists():
        _checked_target(target, force)  # it may have come into being meanwhile
        old = _beside(target, "old")
        os.replace(target, old)
        try:
            os.replace(folder, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, target)
    stamps = {
        _stamp(target / name): entry["sha256"]
        for name, entry in files.items()
        if entry["bytes"] >= ALWAYS_HASHED_BYTES
    }
    if stamps:
        _remember_hashes({**_known_hashes(), **stamps})


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turns what a user can mend about a disk into one line; every other error passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in DISK_IS_FULL or "No space left on device" in str(error):
            raise UserError(
                f"no space left to write {target}; free some, or choose another disk with --out"
            ) from error
        if number not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.ENAMETOOLONG,
            errno.EBUSY,
            errno.EEXIST,
        ):
            raise
        filename = getattr(error, "filename", None)
        if filename and not Path(os.fsdecode(filename)).is_relative_to(target.parent):
            raise UserError(
                f"{os.fsdecode(filename)}: {_reason(error)}; check the path and its permissions"
            ) from error
        raise UserError(
            f"cannot write {target} ({_reason(error)}); choose another folder with --out"
        ) from error


def _check_schema(path: Path, config: dict[str, Any]) -> None:
    version = config.get("schema_version")
    if type(version) is not int or version < 1:
        raise UserError(
            f"{path / CONFIG} has no schema version: this is no bundle of ssd-export;"
            f" {EXPORT_AGAIN}"
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            f"bundle {path} has schema version {version} and this is ssd-export {TOOL_VERSION},"
            f" which reads up to {SCHEMA_VERSION}: use ssd-export"
            f" {config.get('tool_version', 'of a later version')} or newer, or export it again with"
            " this one"
        )


def _check_file(
    path: Path, name: str, entry: dict[str, Any], known: dict[str, str], fresh: dict[str, str]
) -> None:
    """Raises: UserError if the file is not what the manifest says. A large file's new hash goes to
    fresh.
    """
    file = path / name
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"bundle {path}: {name} has {size} bytes, the manifest says {entry['bytes']};"
                f" {EXPORT_AGAIN}"
            )
        stamp = _stamp(file)
        sha256 = known.get(stamp) if size >= ALWAYS_HASHED_BYTES else None
        if sha256 is None:
            sha256 = _sha256(file)
            if size >= ALWAYS_HASHED_BYTES:
                fresh[stamp] = sha256
    except FileNotFoundError:
        raise UserError(f"bundle {path}: {name} is missing; {EXPORT_AGAIN}") from None
    except OSError as error:
        raise UserError(
            f"bundle {path}: {name} cannot be read ({_reason(error)}); {EXPORT_AGAIN}"
        ) from error
    if sha256 != entry["sha256"]:
        raise UserError(
            f"bundle {path}: {name} was changed (its sha256 is not the manifest's); {EXPORT_AGAIN}"
        )


def _read_json(path: Path, name: str, if_missing: str) -> dict[str, Any]:
    try:
        values = json.loads((path / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(if_missing) from None
    except OSError as error:
        raise UserError(
            f"{path / name} cannot be read ({_reason(error)}); check its permissions"
        ) from error
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path / name} is damaged: not a JSON object; {EXPORT_AGAIN}")
    return values


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, to the byte as it is written: safe names, a size and a sha256 for each file."""
    manifest = _read_json(path, MANIFEST, f"bundle {path}: {MANIFEST} is missing; {EXPORT_AGAIN}")
    files = manifest.get("files")
    whole = (
        isinstance(files, dict)
        and CONFIG in files
        and all(
            _is_inside(name)
            and isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            for name, entry in files.items()
        )
    )
    if not whole or (path / MANIFEST).read_bytes() != _manifest_text(files).encode():
        raise UserError(f"{path / MANIFEST} is damaged; {EXPORT_AGAIN}")
    return manifest


def _write_manifest(folder: Path, files: Files) -> dict[str, Any]:
    """The manifest that now stands in the folder, replaced in one step."""
    text = _manifest_text(files)
    _replace_text(folder / MANIFEST, text)
    return json.loads(text)


def _manifest_text(files: Files) -> str:
    values = {"schema_version": SCHEMA_VERSION, "files": dict(sorted(files.items()))}
    return json.dumps(values, indent=1) + "\n"


def _replace_text(path: Path, text: str) -> None:
    """Writes text to path; a reader sees the old text or the new, never a part."""
    partial = _beside(path, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _is_inside(name: str) -> bool:
    """Whether a manifest's name stays inside the bundle: relative, forward slashes, no `..`."""
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return (
        plain and bool(parts) and name == "/".join(parts) and ".." not in parts and parts[0] != "/"
    )


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bundle_hash(files: Files) -> str:
    fixed = sorted((name for name in files if not name.startswith(ADDED_LATER)), key=str.encode)
    listing = "".join(f"{files[name]['sha256']}  {name}\n" for name in fixed)
    return hashlib.sha256(listing.encode()).hexdigest()


def _stamp(path: Path) -> str:
    """What a changed file does not keep: its place, size and times (ctime too: touch cannot set it
    back).
    """
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _hash_cache() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "ssd-export"
        / "sha256.json"
    )


def _known_hashes() -> dict[str, str]:
    """sha256 by stamp, of large files that were hashed before; empty if there is no such memory."""
    try:
        known = json.loads(_hash_cache().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember_hashes(known: dict[str, str]) -> None:
    """Keeps the newest 256; a home that cannot be written only costs time."""
    with suppress(OSError, RuntimeError):
        _hash_cache().parent.mkdir(parents=True, exist_ok=True)
        _replace_text(_hash_cache(), json.dumps(dict(list(known.items())[-256:]), indent=1) + "\n")


def _beside(path: Path, what: str) -> Path:
    """A new name in the same folder, so that a rename is one step."""
    return path.with_name(f"{path.name}.{what}-{os.urandom(4).hex()}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
