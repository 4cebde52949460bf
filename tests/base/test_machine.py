"""The cores and the memory of a container, whichever kernel interface tells of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from farthing.base import machine
from farthing.base.machine import cpu_cores, memory_left, memory_limit


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of /sys/fs/cgroup; the process may run on 16 cores and is in the groups a/b."""
    (tmp_path / "own").write_text("4:memory:/a/b\n3:cpu,cpuacct:/a/b\n0::/a/b\n")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    machine.quota.cache_clear()
    yield tmp_path
    machine.quota.cache_clear()


def put(folder: Path, **files: object) -> None:
    machine.quota.cache_clear()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_a_container_every_core_of_the_affinity_counts() -> None:
    assert cpu_cores() == 16
    assert memory_limit() == memory_left() == float("inf")


def test_a_quota_of_version_2_is_rounded_up(groups: Path) -> None:
    put(groups, cpu__max="250000 100000")
    assert cpu_cores() == 3
    put(groups, cpu__max="max 100000")
    assert cpu_cores() == 16
    put(groups, cpu__max="5000 100000")
    assert cpu_cores() == 1, "a part of a core is a core"


def test_a_quota_of_version_1_counts_too(groups: Path) -> None:
    put(groups / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert cpu_cores() == 16
    put(groups / "cpu", cpu__cfs_quota_us=200_000, cpu__cfs_period_us=100_000)
    assert cpu_cores() == 2


def test_the_narrowest_group_around_the_process_decides(groups: Path) -> None:
    put(groups / "a/b", cpu__max="800000 100000")
    put(groups / "a", cpu__max="400000 100000")
    assert cpu_cores() == 4
    put(groups / "cpu/a/b", cpu__cfs_quota_us=100_000, cpu__cfs_period_us=100_000)
    assert cpu_cores() == 1


def test_a_quota_grants_no_more_than_the_affinity(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    put(groups, cpu__max="800000 100000")
    assert cpu_cores() == 1


def test_what_was_only_read_can_be_given_up(groups: Path) -> None:
    put(groups, memory__max=1_000_000, memory__current=400_000, memory__stat="anon 7\ninactive_file 90000")
    assert memory_limit() == 1_000_000
    assert memory_left() == 690_000
    put(groups, memory__max="max")
    assert memory_limit() == memory_left() == float("inf")


def test_the_memory_of_version_1(groups: Path) -> None:
    used = {"memory__usage_in_bytes": 400_000, "memory__stat": "total_inactive_file 90000"}
    put(groups / "memory", memory__limit_in_bytes=9223372036854771712, **used)
    assert memory_limit() == memory_left() == float("inf"), "the kernel's word for no limit"
    put(groups / "memory/a", memory__limit_in_bytes=500_000, **used)
    assert memory_limit() == 500_000
    assert memory_left() == 190_000


@pytest.mark.parametrize("text", ["", "x", "0 0", "max", "1 2 3", "-5 100000"])
def test_a_file_that_makes_no_sense_limits_nothing(groups: Path, text: str) -> None:
    put(groups, cpu__max=text, memory__max=text, memory__current=text)
    assert cpu_cores() == 16
    assert memory_limit() == float("inf")
    (groups / "own").write_text(text)
    machine.quota.cache_clear()
    assert cpu_cores() == 16
