"""config.json of a checkpoint, read with checks: every message names the file and the field."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError


class ConfigFile:
    """One object of config.json; prefix: its place in the file."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def section(self, name: str) -> ConfigFile:
        """A nested object; an empty one where it is missing. Raises: UserError for another type."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return ConfigFile(self.path, value or {}, f"{self.prefix}{name}.")

    def count(self, name: str, default: int) -> int:
        """A positive integer. Raises: UserError for anything else."""
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive finite number. Raises: UserError for anything else."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(name, value, "a positive number")
        return float(value)

    def counts(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of positive integers. Raises: UserError for anything else."""
        value = self._get(name, default)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or any(type(v) is not int or v < 1 for v in value)
        ):
            raise self.wrong(name, value, "a list of positive integers")
        return tuple(value)

    def require(self, name: str, default: Any, *supported: Any) -> None:
        """Checks that the field has a supported value. Raises: UserError otherwise."""
        value = self._get(name, default)
        if value not in supported:
            raise self.wrong(name, value, " or ".join(repr(v) for v in supported))

    def wrong(self, name: str, value: Any, expected: str) -> UserError:
        """The error for a field: its place, its value and what is expected."""
        return UserError(
            f"{self.path}: {self.prefix}{name} is {shown(value)}, expected {expected}: "
            "give a checkpoint with its own config.json"
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def shown(value: Any) -> str:
    """A foreign value in a message: cut to one short line, whatever its size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)
