"""Memory, CPUs and disk of this machine, within the limits of its control groups."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from ssd_export.cgroups import cpu_quotas, memory_limits
from ssd_export.errors import UserError

SPARE_DISK_BYTES = 64 << 20
ROOT = Path("/")
EXACT_INT8 = frozenset({"avx512_vnni", "avx_vnni"})


def free_bytes(root: Path = ROOT) -> int | None:
    """Memory and swap that can be had now; None where the system does not say.

    The least of what the machine has free, what every limit of the process's control groups leaves
    and what `ulimit -v` leaves. Page cache that the kernel gives back counts as free.
    Args: root: of the file system; tests give a folder.
    """
    meminfo = _meminfo(root)
    if not {"MemAvailable", "SwapFree"} <= meminfo.keys():
        return None
    free = [meminfo["MemAvailable"] + meminfo["SwapFree"]]
    free += [limit.free for limit in memory_limits(root, meminfo["SwapFree"])]
    address_space = _address_space_limit()
    if address_space is not None:
        free.append(max(0, address_space - _statm(root, 0)))
    return min(free)


def total_bytes(root: Path = ROOT) -> int | None:
    """Memory of the machine, or of the container where that has less; None where the system does
    not say.
    """
    meminfo = _meminfo(root)
    if "MemTotal" not in meminfo:
        return None
    limits = [limit.limit for limit in memory_limits(root)]
    return min([meminfo["MemTotal"], *limits, _address_space_limit() or meminfo["MemTotal"]])


def num_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: those of its affinity, within every CPU quota of its
    control groups, at least 1.

    A quota of 1.5 counts as 1: a second thread would be stopped half of the time, with the first
    one waiting for it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(int, cpu_quotas(root))]))


def thread_limit(root: Path = ROOT) -> int:
    """Threads for a library that knows of no quota; 0, the library's own choice, where nothing
    limits this process.
    """
    cpus = num_cpus(root)
    return 0 if cpus >= (os.cpu_count() or 1) else cpus


def multiplies_int8_exactly(root: Path = ROOT) -> bool:
    """Whether products of uint8 and int8 are summed without saturating at 16 bits, as x86 did
    before VNNI; False where the system does not say.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return not EXACT_INT8.isdisjoint(flags)


def free_disk_bytes(path: Path) -> int | None:
    """Bytes free where `path` is, or will be; None where the system does not say."""
    path = path.absolute()
    while True:
        try:
            return shutil.disk_usage(path).free
        except (FileNotFoundError, NotADirectoryError):
            if path == path.parent:
                return None
            path = path.parent
        except OSError:
            return None


def check_disk(path: Path, needed: int, what: str, way_out: str) -> None:
    """Raises UserError where less is free than is needed."""
    free = free_disk_bytes(path)
    if free is not None and needed + SPARE_DISK_BYTES > free:
        raise UserError(
            f"{what} needs {gib(needed + SPARE_DISK_BYTES)} of disk and {gib(free)} are free at"
            f" {path}: {way_out}"
        )


def gib(num_bytes: int) -> str:
    """A size for a message, in GiB or, below one, in MiB."""
    return (
        f"{num_bytes / (1 << 30):.1f} GiB"
        if num_bytes >= 1 << 30
        else f"{max(1, num_bytes >> 20)} MiB"
    )


def resident_bytes() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    return _statm(ROOT, 1)


def _statm(root: Path, field: int) -> int:
    """Bytes of this process: field 0 its address space, 1 what is resident. 0 where unknown."""
    try:
        pages = int((root / "proc/self/statm").read_text().split()[field])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def _address_space_limit() -> int | None:
    """Bytes of `ulimit -v`, None where there is no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where the system does not say."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: 1024 * int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
