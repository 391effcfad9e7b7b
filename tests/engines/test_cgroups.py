"""The C++ library reads the same limits of control groups as Python: every test of
tests/test_cgroups.py again, with what the library says in place of the functions under test.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssd_export.machine import multiplies_int8_exactly
from tests import test_cgroups
from tests.engines.builds import Builds, run

# Tests and fixtures of a module run in every module that has them by name.
globals().update(
    {
        name: value
        for name, value in vars(test_cgroups).items()
        if name.startswith("test_") or name == "machine"
    }
)
Read = Callable[..., SimpleNamespace]
pytestmark = pytest.mark.slow


@pytest.fixture
def read(build: Builds) -> Read:
    program = build("release") / "tests" / "ssd_machine"

    def read(root: Path) -> SimpleNamespace:
        affinity, cpus = len(os.sched_getaffinity(0)), os.cpu_count()
        ran = run([program, root, str(affinity), str(cpus)])
        assert ran.returncode == 0, ran.stderr
        limits, here, exact = (line.split() for line in ran.stdout.splitlines())
        free, total, num_cpus, thread_limit = map(int, limits[:4])
        quotas = [float(quota) for quota in limits[4:]]
        return SimpleNamespace(
            free=free,
            total=total,
            cpus=num_cpus,
            threads=thread_limit,
            quotas=quotas,
            here=here,
            multiplies_int8_exactly=exact == ["1"],
        )

    return read


@pytest.fixture(autouse=True)
def of_the_library(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 where the system does not say is Python's None; limits are known by what they leave."""
    readings = {
        "free_bytes": lambda root: read(root).free or None,
        "total_bytes": lambda root: read(root).total or None,
        "num_cpus": lambda root: read(root).cpus,
        "thread_limit": lambda root: read(root).threads,
        "cpu_quotas": lambda root: read(root).quotas,
        "memory_limits": lambda root: [limit for limit in [read(root).total] if limit < 8000 << 20],
    }
    for name, reading in readings.items():
        monkeypatch.setattr(test_cgroups, name, reading)


@pytest.mark.skipif(
    platform.machine() == "aarch64", reason="64-bit Arm multiplies int8 exactly, always"
)
def test_int8_is_exact_where_the_processor_says_so(read: Read, tmp_path: Path) -> None:
    assert not read(tmp_path).multiplies_int8_exactly  # nothing says so
    (tmp_path / "proc").mkdir()
    for flags in ("fpu avx2 avx512f", "fpu avx2 avx_vnni", "fpu avx512_vnni fma", "avx_vnni2"):
        (tmp_path / "proc" / "cpuinfo").write_text(f"model name\t: one\nflags\t\t: {flags}\n")
        assert read(tmp_path).multiplies_int8_exactly is multiplies_int8_exactly(tmp_path)


def test_affinity_and_cpus_of_this_machine(read: Read, tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    assert read(tmp_path).here == [str(len(affinity)), str(os.cpu_count())]
    os.sched_setaffinity(0, {min(affinity)})
    try:
        assert read(tmp_path).here[0] == "1"
    finally:
        os.sched_setaffinity(0, affinity)
