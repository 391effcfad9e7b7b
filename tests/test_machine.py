"""What is free, and the refusals: one line with ways out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd_export import machine
from ssd_export.errors import UserError
from ssd_export.machine import check_disk, free_bytes, free_disk_bytes, resident_bytes
from ssd_export.plan.memory import check_fits


def test_free_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\nSwapFree: 1000 kB\n")
    assert free_bytes(meminfo, limit, used) == 5000 * 1024
    limit.write_text("max\n")
    used.write_text("100\n")
    assert free_bytes(meminfo, limit, used) == 5000 * 1024
    limit.write_text("1000100\n")
    assert free_bytes(meminfo, limit, used) == 1000000
    assert free_bytes(tmp_path / "nothing", limit, used) is None


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
    check_fits("drawing", 1 << 30, ("draw fewer",), 2 << 30)
    with pytest.raises(UserError) as refused:
        check_fits("drawing", 8 << 30, ("draw fewer",), 5 << 30)
    for part in (
        "drawing needs about 8.0 GiB",
        "5.0 GiB are free: draw fewer",
        "3.0 GiB of swap",
        "or try all the same",
    ):
        assert part in str(refused.value)


def test_this_process_is_somewhere_in_memory() -> None:
    assert 10 << 20 < resident_bytes() < 100 << 30
