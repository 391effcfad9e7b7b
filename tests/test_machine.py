"""What is free, and the refusals: one line with ways out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssd_export import machine
from ssd_export.errors import UserError
from ssd_export.machine import check_disk, free_bytes, free_disk_bytes, resident_bytes, total_bytes
from ssd_export.plan.memory import check_fits


def test_an_address_space_limit_bounds_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ulimit -v`: what is left of it, and no more, can be had."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 0 kB\n")
    (proc / "self" / "statm").write_text("100 50 0 0 0 0 0\n")
    page = os.sysconf("SC_PAGE_SIZE")
    limit = 100 * page + (1 << 20)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (limit, limit))
    assert (free_bytes(tmp_path), total_bytes(tmp_path)) == (1 << 20, limit)


def test_disk_is_that_of_the_nearest_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_disk_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(
        free_disk_bytes(tmp_path), rel=0.1
    )
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: 1 << 30)
    check_disk(tmp_path, 900 << 20, "the bundle", "free some")
    with pytest.raises(
        UserError, match=r"the bundle needs 1\.1 GiB of disk and 1\.0 GiB are free at .*: free some"
    ):
        check_disk(tmp_path, 1 << 30, "the bundle", "free some")
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: None)
    check_disk(tmp_path, 1 << 60, "the bundle", "free some")


def test_too_little_memory_names_every_way_out() -> None:
    check_fits("generating", 1 << 30, ("generate fewer",), 2 << 30)
    with pytest.raises(UserError) as refused:
        check_fits("generating", 8 << 30, ("generate fewer",), 5 << 30)
    for part in (
        "generating needs about 8.0 GiB",
        "5.0 GiB are free: generate fewer",
        "3.0 GiB of swap",
        "or try all the same",
    ):
        assert part in str(refused.value)


def test_this_process_is_somewhere_in_memory() -> None:
    assert 10 << 20 < resident_bytes() < 100 << 30


def test_int8_is_exact_where_the_processor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not machine.multiplies_int8_exactly(tmp_path)  # nothing says so
    (tmp_path / "proc").mkdir()
    for flags, exact in (("fpu avx2 avx512f", False), ("fpu avx2 avx_vnni", True)):
        (tmp_path / "proc" / "cpuinfo").write_text(f"model name\t: one\nflags\t\t: {flags}\n")
        assert machine.multiplies_int8_exactly(tmp_path) is exact
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.multiplies_int8_exactly(tmp_path / "empty")
