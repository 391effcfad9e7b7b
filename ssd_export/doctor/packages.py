"""Installed packages against what pyproject.toml asks for, read from the metadata; nothing is
imported.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTION = "ssd-export"
REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:[(]?[>=]=(?P<least>[0-9][0-9.]*))?[^;]*"
    r"(?:;.*?extra == ['\"](?P<extra>[\w-]+)['\"])?"
)
# onnxruntime is one folder that two packages write into.
ONE_OF = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Package:
    """A package that a part of this one needs. extra: "" where every part does; version: "" where
    it is not installed.
    """

    name: str
    extra: str
    least: str
    version: str

    @property
    def is_old(self) -> bool:
        """Whether it is installed, and older than the oldest version that works."""
        return bool(self.version) and _numbers(self.version) < _numbers(self.least)


def packages(extras: tuple[str, ...]) -> list[Package]:
    """The packages of the base and of these extras; [] for sources that were never installed."""
    try:
        listed = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in listed:
        match = REQUIREMENT.match(requirement)
        if match is None or not _is_for_here(requirement):
            continue
        extra = match["extra"] or ""
        name = match["name"].lower()
        if name != DISTRIBUTION and (not extra or extra in extras):
            found.append(Package(name, extra, match["least"] or "", version(name)))
    return found


def version(name: str) -> str:
    """The installed version of a distribution, "" where there is none."""
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def clashing() -> list[str]:
    """Packages that must not share an environment, where they do."""
    there = [name for name in ONE_OF if version(name)]
    return there if len(there) > 1 else []


def _is_for_here(requirement: str) -> bool:
    """Whether the marker names this Python: one of ours is for 3.10 alone."""
    older = re.search(r"python_version < ['\"]3\.(\d+)", requirement)
    return older is None or sys.version_info < (3, int(older[1]))


def _numbers(text: str) -> tuple[int, ...]:
    """1.20.0rc1 as (1, 20), so that 1.20 and 1.20.0 are one version."""
    found = []
    for part in text.split("+")[0].split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        found.append(int(digits[0]))
        if digits[0] != part:
            break
    while found and not found[-1]:
        found.pop()
    return tuple(found)
