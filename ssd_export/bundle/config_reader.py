"""Reads ssd_config.json: its schema version first, then every value, checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssd_export.bundle.config import CONFIG, EXPORT_AGAIN, SCHEMA_VERSION, BundleConfig, leftover_of
from ssd_export.bundle.config_checks import check_config
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import NOT_THERE, os_error
from ssd_export.typed_json import MAX_BYTES, parse_json, shown
from ssd_export.version import TOOL_VERSION


@dataclass(frozen=True)
class _Version:
    schema_version: int = 0
    tool_version: str = "of a later version"


@dataclass(frozen=True)
class _EarlierPolicy:
    name: str = "ssd-auto"
    budget: float = 0.2
    kv_dtype: str = "model"


@dataclass(frozen=True)
class _EarlierConfig:
    """The facts that a config of an earlier schema version gives about its export."""

    model_name: str = "demo"
    dtype: str = "float32"
    precision: dict[str, Any] = field(default_factory=dict)
    policy: _EarlierPolicy = _EarlierPolicy()


def read_config(folder: Path, if_missing: str = "") -> BundleConfig:
    """The checked ssd_config.json of a folder.

    Args: if_missing: the message where there is none, instead of the usual one.
    Raises: UserError where it is missing, of another schema version, or any value is wrong.
    """
    return parse_config(read_config_text(folder, if_missing), str(folder / CONFIG))


def read_config_text(folder: Path, if_missing: str = "") -> bytes:
    """The unchecked text of ssd_config.json. Raises: UserError where it cannot be read."""
    path = folder / CONFIG
    try:
        return read_file(path, MAX_BYTES)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise os_error(error, "read", path) from error
        raise UserError(if_missing or _missing(folder)) from None


def _missing(folder: Path) -> str:
    text = f"no bundle at {folder}: make one with `ssd-export export`, or give --bundle DIR"
    left = leftover_of(folder)
    return (
        text if left is None else f"{text} ({left} is an earlier bundle that a killed export left)"
    )


def parse_config(content: bytes, source: str) -> BundleConfig:
    """The checked value of ssd_config.json's text. Raises: UserError as read_config."""
    _check_schema(content, source)
    config = parse_json(content, BundleConfig, source, EXPORT_AGAIN)
    check_config(config, source)
    return config


def _check_schema(content: bytes, source: str) -> None:
    found = parse_json(content, _Version, source, EXPORT_AGAIN)
    if found.schema_version < 1:
        raise UserError(
            f"{source} has no schema version: this is no bundle of ssd-export; {EXPORT_AGAIN}"
        )
    if found.schema_version < SCHEMA_VERSION:
        made = parse_json(content, _EarlierConfig, source, EXPORT_AGAIN)
        raise UserError(
            f"{source} has schema version {found.schema_version}, from an earlier ssd-export, and"
            f" this one reads version {SCHEMA_VERSION}; make it again with"
            f" `{_export_command(made, Path(source).parent)}`"
        )
    if found.schema_version > SCHEMA_VERSION:
        theirs = shown(found.tool_version).strip('"')
        raise UserError(
            f"{source} has schema version {found.schema_version} and this is ssd-export"
            f" {TOOL_VERSION}, which reads version {SCHEMA_VERSION}: use ssd-export"
            f" {theirs} or newer, or export it again with this one"
        )


def _export_command(found: _EarlierConfig, folder: Path) -> str:
    """The command line that makes a bundle like this one."""
    options = {
        "--model": found.model_name,
        "--policy": found.policy.name,
        "--budget": f"{found.policy.budget:g}",
        "--dtype": DTYPES[found.dtype].short if found.dtype in DTYPES else "fp32",
        "--weights": str(found.precision.get("weights", "none")),
        "--kv-dtype": found.policy.kv_dtype,
        "--out": str(folder),
    }
    words = [word for option in options.items() for word in option]
    command = shlex.join(["ssd-export", "export", *words, "--force"])
    return command if command.isprintable() else "ssd-export export --out DIR --force"
