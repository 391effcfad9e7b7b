"""What this machine has: memory, disk; and one line with a way out where that is not enough."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ssd_export.errors import UserError

FREE_BYTES = (
    Path("/proc/meminfo"),
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory.current"),
)
SPARE_DISK_BYTES = 64 << 20


def free_bytes(
    meminfo: Path = FREE_BYTES[0], limit: Path = FREE_BYTES[1], used: Path = FREE_BYTES[2]
) -> int | None:
    """Memory and swap that can be had now, within the container's limit; None where the system does
    not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return free


def total_bytes(meminfo: Path = FREE_BYTES[0], limit: Path = FREE_BYTES[1]) -> int | None:
    """Memory of the machine, or of the container where that has less; None where the system does
    not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total = 1024 * int(lines["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return total


def free_disk_bytes(path: Path) -> int | None:
    """Bytes free where `path` is, or will be; None where the system does not say."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def check_disk(path: Path, needed: int, what: str, way_out: str) -> None:
    """Raises: UserError where less is free than is needed."""
    free = free_disk_bytes(path)
    if free is not None and needed + SPARE_DISK_BYTES > free:
        raise UserError(
            f"{what} needs {gib(needed + SPARE_DISK_BYTES)} of disk and {gib(free)} are free at"
            f" {path}: {way_out}"
        )


def gib(num_bytes: int) -> str:
    return (
        f"{num_bytes / (1 << 30):.1f} GiB"
        if num_bytes >= 1 << 30
        else f"{max(1, num_bytes >> 20)} MiB"
    )


def resident_bytes() -> int:
    """What this process holds now: the libraries it has loaded, mostly. 0 where the system does not
    say.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
