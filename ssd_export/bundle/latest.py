"""The newest bundle exported from the current folder, named in bundles/.latest."""

from __future__ import annotations

from pathlib import Path

from ssd_export.errors import UserError
from ssd_export.files import read_file, reason, replace_text

LATEST = Path("bundles") / ".latest"
MAX_PATH_BYTES = 1 << 16  # of the file; the longest path of any system has 32 KiB


def remember_latest(bundle_path: Path) -> None:
    """Notes the bundle as this folder's latest, in bundles/.latest. Raises: OSError if it
    cannot.
    """
    LATEST.parent.mkdir(exist_ok=True)
    bundle_path, home = bundle_path.resolve(), LATEST.parent.resolve()
    inside = bundle_path.is_relative_to(home)
    replace_text(LATEST, f"{bundle_path.relative_to(home) if inside else bundle_path}\n")


def latest_bundle() -> Path | None:
    """The bundle that was exported last from this folder, or None; it may have been deleted since.

    Raises: UserError where bundles/.latest names none.
    """
    way_out = "give a bundle's path, or delete it and run `ssd-export export`"
    try:
        name = read_file(LATEST, MAX_PATH_BYTES).decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{LATEST} cannot be read ({reason(error)}); {way_out}") from None
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{LATEST} names no bundle ({error}); {way_out}") from None
    if not name.isprintable():
        raise UserError(f"{LATEST} names no bundle ({name!r:.60}); {way_out}")
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
    try:
        is_there = latest.is_dir()
    except OSError as error:  # a name that no file system takes
        raise UserError(
            f"{LATEST} names no bundle ({reason(error)}); give a bundle's path, or delete it and"
            " run `ssd-export export`"
        ) from None
    if not is_there:
        raise UserError(
            f"the latest bundle {latest} is gone: run `ssd-export export`, or give another bundle's"
            " path"
        )
    return latest
