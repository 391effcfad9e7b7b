"""Limits that Linux control groups set on this process, by its own group and every parent of it.

Containers, systemd and batch systems limit memory and CPU time with them. Both versions are read:
v2 (one tree: memory.max, cpu.max) and v1 (a tree for each controller: memory.limit_in_bytes,
cpu.cfs_quota_us), wherever they are mounted. Page cache counts as used memory in both; the part
that the kernel gives back at once is counted as free here.

Every function takes the root of the file system, so that a folder of fixtures can stand for it.
Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NO_LIMIT_V1 = 1 << 60  # v1 says "none" as the largest multiple of a page below 2**63
LIMIT_FILES = {
    "memory": {1: "memory.limit_in_bytes", 2: "memory.max"},
    "cpu": {1: "cpu.cfs_quota_us", 2: "cpu.max"},
}
STAT_PREFIX = {1: "total_", 2: ""}  # v1 counts the groups below under other names
DIRTY = {1: ("dirty", "writeback"), 2: ("file_dirty", "file_writeback")}


@dataclass(frozen=True)
class Group:
    """A control group's folder. version: 1 or 2."""

    folder: Path
    version: int


@dataclass(frozen=True)
class MemoryLimit:
    """A limit in bytes, and what of it can still be had; swap that is left is part of it."""

    group: Path
    limit: int
    free: int


def memory_limits(root: Path = Path("/"), swap_free: int = 0) -> list[MemoryLimit]:
    """Every memory limit of this process. swap_free: bytes of swap that the machine has left."""
    limits = []
    for group in _groups("memory", root):
        read = _v2_memory if group.version == 2 else _v1_memory
        limits += [MemoryLimit(group.folder, *pair) for pair in read(group.folder, swap_free)]
    return limits


def cpu_quotas(root: Path = Path("/")) -> list[float]:
    """CPUs' worth of time of every limit of this process: 1.5 is a half more than one CPU."""
    quotas = []
    for group in _groups("cpu", root):
        if group.version == 2:
            quota, period = (_text(group.folder / "cpu.max").split() + ["", ""])[:2]
        else:
            quota = _text(group.folder / "cpu.cfs_quota_us").strip()
            period = _text(group.folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return quotas


def _v2_memory(folder: Path, swap_free: int) -> Iterator[tuple[int, int]]:
    """(limit, free). memory.high counts too: above it the kernel slows a group until it stands."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    used = _number(folder / "memory.current") or 0
    swap_limit = _number(folder / "memory.swap.max")
    swap = swap_free
    if swap_limit is not None:
        swap = min(swap_free, max(0, swap_limit - (_number(folder / "memory.swap.current") or 0)))
    for limit in limits:
        if limit is not None:
            yield limit, max(0, limit - used + _reclaimable(folder, 2)) + swap


def _v1_memory(folder: Path, swap_free: int) -> Iterator[tuple[int, int]]:
    """(limit, free) of memory, and of memory and swap together."""
    given_back = _reclaimable(folder, 1)
    stat = _stat(folder)
    for kind, swap in (("memory", swap_free), ("memory.memsw", 0)):
        # parents that a container does not see stand in memory.stat alone
        seen = "hierarchical_memory_limit" if kind == "memory" else "hierarchical_memsw_limit"
        limits = (_number(folder / f"{kind}.limit_in_bytes"), stat.get(seen))
        used = _number(folder / f"{kind}.usage_in_bytes") or 0
        limit = min((found for found in limits if found is not None), default=NO_LIMIT_V1)
        if limit < NO_LIMIT_V1:
            yield limit, max(0, limit - used + given_back) + swap


def _reclaimable(folder: Path, version: int) -> int:
    """Bytes of clean page cache, and of the kernel's own caches, which it drops when asked."""
    stat, prefix = _stat(folder), STAT_PREFIX[version]
    files = sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
    dirty = sum(stat.get(f"{prefix}{name}", 0) for name in DIRTY[version])
    return max(0, files - dirty) + stat.get("slab_reclaimable", 0)


def _groups(controller: str, root: Path) -> Iterator[Group]:
    """The process's own groups of a controller and their parents, those with a limit file."""
    own = _own_paths(controller, root)
    mounts = [mount for mount in _mounts(controller, root) if mount.version in own]
    found = [group for mount in mounts for group in _between(mount, own[mount.version], False)]
    if not found:  # a mount of another namespace: its top is all that can be told
        found = [group for mount in mounts for group in _between(mount, own[mount.version], True)]
    groups = [group for group in found if _limits(group, controller)]
    if not groups:  # nothing of /proc fits what is mounted (a sandbox): what is in the usual place
        usual = Group(root / "sys/fs/cgroup", 2)
        groups = [usual] if _limits(usual, controller) else []
    yield from dict.fromkeys(groups)


def _limits(group: Group, controller: str) -> bool:
    return _text(group.folder / LIMIT_FILES[controller][group.version]) != ""


@dataclass(frozen=True)
class _Mount:
    """A mounted cgroup hierarchy. top: the group that is mounted at point."""

    top: PurePosixPath
    point: Path
    version: int


def _own_paths(controller: str, root: Path) -> dict[int, PurePosixPath]:
    """The process's group by version, from /proc/self/cgroup: `4:memory:/a/b`, `0::/a/b`."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            paths[2] = PurePosixPath(path)
        elif controller in controllers.split(","):
            paths[1] = PurePosixPath(path)
    return paths


def _mounts(controller: str, root: Path) -> Iterator[_Mount]:
    """Mounts of a controller, from /proc/self/mountinfo (proc(5)): `... top point ... - type`."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup": 1, "cgroup2": 2}.get(kind[0])
        if version == 2 or (version == 1 and controller in kind[2].split(",")):
            point = root / _unescaped(fields[4]).lstrip("/")
            yield _Mount(PurePosixPath(_unescaped(fields[3])), point, version)


def _between(mount: _Mount, own: PurePosixPath, whatever_is_mounted: bool) -> Iterator[Group]:
    """The group and its parents up to what is mounted; nothing where it is not below that."""
    if own.is_relative_to(mount.top):
        folder = mount.point / own.relative_to(mount.top)
    elif whatever_is_mounted:
        folder = mount.point
    else:
        return
    while True:
        yield Group(folder, mount.version)
        if folder == mount.point:
            return
        folder = folder.parent


def _stat(folder: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number in a file; None for no such file, and for "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """The content, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescaped(field: str) -> str:
    """A field of mountinfo: a space is written as backslash 040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
