"""Limits of control groups, read from folders that stand for the root of a file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd_export.cgroups import cpu_quotas, memory_limits
from ssd_export.machine import free_bytes, num_cpus, thread_limit, total_bytes

MIB = 1 << 20
NO_LIMIT_V1 = "9223372036854771712\n"
MOUNT = "31 23 0:28 {top} {point} rw,relatime shared:9 - {kind} {kind} rw,{controllers}\n"


class Machine:
    """A file system with /proc and mounted control groups; 8,000 MiB, 6,000 of them free."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.own: list[str] = []
        self.mounts: list[str] = []
        meminfo = {"MemTotal": 8000, "MemAvailable": 6000, "SwapFree": 500}
        lines = "".join(f"{name}:   {1024 * mib} kB\n" for name, mib in meminfo.items())
        self.write("proc/meminfo", lines)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mount(self, kind: str, controllers: str, point: str, top: str = "/") -> None:
        self.mounts.append(MOUNT.format(kind=kind, controllers=controllers, point=point, top=top))
        self.write("proc/self/mountinfo", "".join(self.mounts))

    def belongs_to(self, line: str) -> None:
        self.own.append(line + "\n")
        self.write("proc/self/cgroup", "".join(self.own))

    def group(self, folder: str, **files: int | str) -> None:
        """Files of a group, with __ for the dot: memory__max=5."""
        for name, value in files.items():
            self.write(f"{folder}/{name.replace('__', '.')}", f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def v2(machine: Machine, own: str = "/", top: str = "/") -> None:
    machine.mount("cgroup2", "", "/sys/fs/cgroup", top)
    machine.belongs_to(f"0::{own}")


def v1(machine: Machine, own: str, controller: str = "memory", top: str = "/") -> None:
    machine.mount("cgroup", controller, f"/sys/fs/cgroup/{controller}", top)
    machine.belongs_to(f"4:{controller}:{own}")


def test_without_groups_the_machine_is_the_limit(machine: Machine, tmp_path: Path) -> None:
    assert free_bytes(machine.root) == 6500 * MIB
    assert total_bytes(machine.root) == 8000 * MIB
    assert memory_limits(machine.root) == [] and cpu_quotas(machine.root) == []
    assert free_bytes(tmp_path / "nothing") is None and total_bytes(tmp_path / "nothing") is None


def test_v2_counts_clean_page_cache_as_free(machine: Machine) -> None:
    """A container of 800 MiB that has just read a large file: nearly all of it can be had."""
    v2(machine)
    stat = (
        f"anon {20 * MIB}\nfile {760 * MIB}\ninactive_file {700 * MIB}\nactive_file {60 * MIB}\n"
        f"file_dirty {30 * MIB}\nfile_writeback {10 * MIB}\nslab_reclaimable {5 * MIB}\n"
    )
    machine.group(
        "sys/fs/cgroup", memory__max=800 * MIB, memory__current=790 * MIB, memory__stat=stat
    )
    machine.group("sys/fs/cgroup", memory__swap__max=0, memory__swap__current=0)
    assert free_bytes(machine.root) == (800 - 790 + 760 - 40 + 5) * MIB
    assert total_bytes(machine.root) == 800 * MIB


def test_v2_without_statistics_counts_all_that_is_used(machine: Machine) -> None:
    v2(machine)
    machine.group("sys/fs/cgroup", memory__max=800 * MIB, memory__current=790 * MIB)
    machine.group("sys/fs/cgroup", memory__swap__max=0)
    assert free_bytes(machine.root) == 10 * MIB


@pytest.mark.parametrize("tightest", ["a", "a/b", "a/b/c"])
def test_the_least_of_all_parents_counts(machine: Machine, tightest: str) -> None:
    v2(machine, "/a/b/c")
    for group in ("a", "a/b", "a/b/c"):
        limit = 300 if group == tightest else 900
        folder = f"sys/fs/cgroup/{group}"
        machine.group(folder, memory__max=limit * MIB, memory__current=100 * MIB)
        machine.group(folder, memory__swap__max=0)
    machine.group("sys/fs/cgroup/a/other", memory__max=1, memory__current=0)
    assert free_bytes(machine.root) == 200 * MIB
    assert total_bytes(machine.root) == 300 * MIB


def test_v2_high_is_a_limit_and_max_is_none(machine: Machine) -> None:
    v2(machine, "/a")
    machine.group("sys/fs/cgroup/a", memory__max="max", memory__current=100 * MIB)
    assert total_bytes(machine.root) == 8000 * MIB
    machine.group("sys/fs/cgroup/a", memory__high=400 * MIB, memory__swap__max=0)
    assert (free_bytes(machine.root), total_bytes(machine.root)) == (300 * MIB, 400 * MIB)


@pytest.mark.parametrize("swap, left", [("max", 500), (200 * MIB, 150), (10 * MIB, 0)])
def test_swap_that_the_group_may_use_is_free(machine: Machine, swap: int | str, left: int) -> None:
    v2(machine)
    machine.group("sys/fs/cgroup", memory__max=800 * MIB, memory__current=700 * MIB)
    machine.group("sys/fs/cgroup", memory__swap__max=swap, memory__swap__current=50 * MIB)
    assert free_bytes(machine.root) == (100 + left) * MIB


def test_v1_limits_and_their_page_cache(machine: Machine) -> None:
    v1(machine, "/docker/abc")
    stat = (
        f"inactive_file 1\ntotal_inactive_file {600 * MIB}\ntotal_active_file {100 * MIB}\n"
        f"total_dirty {20 * MIB}\ntotal_writeback 0\nhierarchical_memory_limit {800 * MIB}\n"
    )
    folder = "sys/fs/cgroup/memory/docker/abc"
    machine.group(folder, memory__limit_in_bytes=800 * MIB, memory__usage_in_bytes=790 * MIB)
    machine.group(folder, memory__stat=stat)
    assert total_bytes(machine.root) == 800 * MIB
    assert free_bytes(machine.root) == (10 + 680 + 500) * MIB  # and the machine's swap
    machine.group(folder, memory__memsw__limit_in_bytes=800 * MIB)
    machine.group(folder, memory__memsw__usage_in_bytes=795 * MIB)
    assert free_bytes(machine.root) == (5 + 680) * MIB


def test_v1_knows_of_parents_that_the_container_does_not_see(machine: Machine) -> None:
    v1(machine, "/docker/abc", top="/docker/abc")
    folder = "sys/fs/cgroup/memory"
    machine.group(folder, memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=50 * MIB)
    machine.group(folder, memory__stat=f"hierarchical_memory_limit {250 * MIB}\n")
    assert total_bytes(machine.root) == 250 * MIB
    assert free_bytes(machine.root) == (200 + 500) * MIB


def test_v1_without_a_limit_is_none(machine: Machine) -> None:
    v1(machine, "/a")
    folder = "sys/fs/cgroup/memory/a"
    machine.group(folder, memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=50 * MIB)
    assert memory_limits(machine.root) == []


def test_a_container_that_is_mounted_at_the_top_is_found(machine: Machine) -> None:
    """Docker with v1 shows the host's path of the group and mounts that group alone."""
    v2(machine, "/kubepods/pod1/abc", top="/kubepods/pod1/abc")
    machine.group("sys/fs/cgroup", memory__max=90 * MIB, memory__current=0, memory__swap__max=0)
    assert free_bytes(machine.root) == 90 * MIB


def test_a_namespace_whose_paths_do_not_fit_falls_back_to_what_is_mounted(machine: Machine) -> None:
    v2(machine, "/", top="/../..")
    machine.group("sys/fs/cgroup", memory__max=90 * MIB, memory__current=0, memory__swap__max=0)
    assert free_bytes(machine.root) == 90 * MIB


def test_a_mount_point_with_a_space(machine: Machine) -> None:
    machine.mount("cgroup2", "", r"/mnt/my\040groups")
    machine.belongs_to("0::/")
    machine.group("mnt/my groups", memory__max=90 * MIB, memory__current=0)
    assert total_bytes(machine.root) == 90 * MIB


def test_files_in_the_usual_place_count_where_no_mount_says_so(machine: Machine) -> None:
    machine.group("sys/fs/cgroup", memory__max=4_000_000, memory__current=0)
    assert total_bytes(machine.root) == 4_000_000


def test_a_hybrid_machine_reads_both_versions(machine: Machine) -> None:
    v1(machine, "/a")
    machine.mount("cgroup2", "", "/sys/fs/cgroup/unified")
    machine.belongs_to("0::/a")
    folder = "sys/fs/cgroup/memory/a"
    machine.group(folder, memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=0)
    machine.group("sys/fs/cgroup/unified/a", memory__max=200 * MIB, memory__current=0)
    assert total_bytes(machine.root) == 200 * MIB


def test_cpu_quotas_of_every_level_and_version(machine: Machine) -> None:
    v2(machine, "/a/b")
    machine.group("sys/fs/cgroup/a", cpu__max="150000 100000")
    machine.group("sys/fs/cgroup/a/b", cpu__max="max 100000")
    assert cpu_quotas(machine.root) == [1.5]
    machine.mount("cgroup", "cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct")
    machine.belongs_to("3:cpu,cpuacct:/a")
    folder = "sys/fs/cgroup/cpu,cpuacct/a"
    machine.group(folder, cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    machine.group("sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert sorted(cpu_quotas(machine.root)) == [0.5, 1.5]
    assert num_cpus(machine.root) == 1


def test_cpus_are_those_of_the_affinity_within_the_quota(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert num_cpus(machine.root) == 6 and thread_limit(machine.root) == 6
    v2(machine)
    machine.group("sys/fs/cgroup", cpu__max="250000 100000")
    assert num_cpus(machine.root) == 2
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert thread_limit(machine.root) == 0  # all there are: the library's own choice


@pytest.mark.parametrize("text", ["", "max\n", "-5\n", "twelve\n", "1e9\n", "\x00\xff", "9" * 400])
def test_unexpected_content_is_no_limit_and_no_crash(machine: Machine, text: str) -> None:
    v2(machine)
    for name in ("memory.max", "memory.current", "memory.stat", "cpu.max", "memory.swap.max"):
        machine.write(f"sys/fs/cgroup/{name}", text)
    machine.write("proc/self/cgroup", "0::/\nrubbish\n7\n::\n")
    # A number without end is a limit that is all used: swap is left.
    assert free_bytes(machine.root) == (500 if text.isdigit() else 6500) * MIB
    assert num_cpus(machine.root) == num_cpus(machine.root / "nothing")
