"""Cores and memory that this process may use: its affinity, and the limits of its container.

A container's limits are those of its control group and of every group around it, in either version of the kernel's
interface (cgroup v1 and v2). What cannot be read limits nothing.
"""

from __future__ import annotations

import functools
import math
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 62  # version 1 writes the largest number of pages for it


def cpu_cores() -> int:
    """Logical cores that this process may use, at least 1: its affinity, and its container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, quota()))


@functools.cache
def quota() -> int:
    """Cores that the container grants, a part of one rounded up, as they were at the first call."""
    return min(map(math.ceil, _quotas()), default=1 << 30)


def memory_limit() -> float:
    """Memory limit of the container in bytes; infinite without a limit."""
    return min((limit for limit, _ in _memory()), default=math.inf)


def memory_left() -> float:
    """Bytes to the nearest limit of the container, its page cache counted as free, or of `ulimit -v`; infinite
    without a limit."""
    limits = [max(0, limit - used) for limit, used in _memory()]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        limits.append(max(0, most - _address_space()))
    return min(limits, default=math.inf)


def _address_space() -> int:
    """Bytes of this process's address space, which `ulimit -v` limits."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _quotas() -> Iterator[float]:
    """Cores that each group around this process grants."""
    for folder in _folders(""):
        try:
            granted, period = (folder / "cpu.max").read_text().split()
            if (cores := int(granted) / int(period)) > 0:
                yield cores
        except (OSError, ValueError, ZeroDivisionError):  # another version, or "max": no quota
            continue
    for folder in _folders("cpu"):
        allowed, each = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if allowed and each and allowed > 0:
            yield allowed / each


def _memory() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each group around this process that has a limit."""
    for controller, most, current in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in _folders(controller):
            limit, used = _number(folder / most), _number(folder / current)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                yield limit, used - _inactive_files(folder / "memory.stat")


def _folders(controller: str) -> Iterator[Path]:
    """The control group of this process and those around it, for a controller of version 1, or "" for version 2.

    Inside a container the group's own path may not be mounted; then only the root is, which is the container's group.
    """
    root = _GROUPS / controller
    yield root
    try:
        text = _OWN.read_text()
    except OSError:
        return
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and controller in controllers.split(","):
            folder = root / path.lstrip("/")
            while folder != root and root in folder.parents:
                yield folder
                folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # another version, or "max"
        return None


def _inactive_files(path: Path) -> int:
    """Bytes of page cache that the kernel gives back first."""
    try:
        found = re.search(r"^(?:total_)?inactive_file (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
