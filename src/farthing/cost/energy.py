"""Joules drawn by a run so far: measured where the machine has counters, estimated elsewhere.

They cover the processor package and, on a GPU, the board, but not memory, disks, fans and cooling.

- CPU, measured: the RAPL counters, through codecarbon. They see the whole package, other people's work
  included.
- CPU, estimated: codecarbon's table of thermal design powers P, and this process tree's share of the cores
  s: P * (0.1 + 0.9 * s) watts. codecarbon's own model agrees at s = 0 and s = 1; it is cubic in between,
  which cannot be added up over spans of any length, so ours is the straight line.
- GPU, measured: NVML's total energy counter. If it is missing or reads zero (codecarbon#1316), the estimate is
  power times time, or the board's limit times time if NVML reports no power either.

A sum with any estimated part is called estimated.
"""

from __future__ import annotations

import csv
import functools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from farthing.base.machine import cpu_cores
from farthing.cost.devices import Device, cpu_model

JoulesAre = Literal["measured", "estimated"]

IDLE_SHARE = 0.1  # of the design power, drawn by a processor with nothing to do: codecarbon's floor
_WATTS_PER_CORE = 4.0  # of a processor in no table: codecarbon's default per hardware thread
_WATTS_PER_BOARD = 300.0  # assumed for an unknown board: better than a silent zero
SCAN_SECONDS = 5.0  # between scans for new child processes; each scan reads all of /proc


class _Source(Protocol):
    joules_are: JoulesAre

    def joules(self, now: float) -> float:
        """Joules from the start to `now` (monotonic seconds)."""


class EnergyMeter:
    """Cumulative joules of the process tree on its device. Safe to read from several threads.

    It watches `devices` devices of the kind `device`, and a GPU's host processor too. Starting takes milliseconds:
    codecarbon's own tracker takes one to two seconds to probe the machine, so only its table and its counters are
    used, without its logs, files and network.
    """

    def __init__(
        self, device: Device, devices: int = 1, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        now = monotonic()
        self._sources: list[_Source] = [package_counter(now) or _ProcessTree(now)]
        if device.kind == "gpu":
            self._sources += _gpus(device, devices, now)
        self._last = 0.0

    def joules(self) -> tuple[float, JoulesAre]:
        """Joules since the start, never less than the last time, and whether all of them were measured."""
        with self._lock:
            now = self._monotonic()
            self._last = max(self._last, sum(source.joules(now) for source in self._sources))
            measured = all(source.joules_are == "measured" for source in self._sources)
            return self._last, "measured" if measured else "estimated"


def estimate(seconds: float, cpu_seconds: float) -> float:
    """Estimated joules of the CPU over `seconds` in which `cpu_seconds` of its cores were used."""
    return cpu_watts() * (IDLE_SHARE * seconds + (1 - IDLE_SHARE) * cpu_seconds / cpu_cores())


@functools.cache
def cpu_watts() -> float:
    """Design power, in watts, of the cores that this process may use, by the model's name.

    The table is for whole packages, and a virtual machine cannot see the size of the package its cores are from.
    There, and for a model that is not in the table, it is codecarbon's 4 W per hardware thread.
    """
    default = _WATTS_PER_CORE * cpu_cores()
    if is_virtual():
        return default
    known = _design_powers().get(_plain(cpu_model()))
    if known is None:
        return default
    return known * packages() * cpu_cores() / (os.cpu_count() or 1)


@functools.cache
def _design_powers() -> dict[str, float]:
    """codecarbon's table of processors, by plain name; empty without codecarbon.

    Read as a file because asking codecarbon costs its import of pandas and a second of probing the processor.
    """
    try:
        table = resources.files("codecarbon").joinpath("data/hardware/cpu_power.csv").read_text("utf-8")
    except (ImportError, OSError):
        return {}
    powers = {}
    for row in csv.DictReader(table.splitlines()):
        try:
            powers[_plain(row["Name"])] = float(row["TDP"])
        except (KeyError, TypeError, ValueError):  # a row of a future release that we cannot read
            continue
    return powers


def _plain(model: str) -> str:
    """A processor's name without marks, clock and filler words, the same for the kernel's and the table's."""
    noise = r"\((r|tm)\)|@.*$|\bwith radeon.*$|\b\d+th gen\b|\b\d+-core\b|\b(cpu|processor)\b"
    name = re.sub(noise, " ", model.lower())
    return " ".join(name.split())


def _cpuinfo(field: str) -> list[str]:
    """The values of a field of /proc/cpuinfo, one per core; empty without such a file."""
    try:
        return re.findall(rf"^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []


def is_virtual() -> bool:
    return any("hypervisor" in flags.split() for flags in _cpuinfo("flags")[:1])


def packages() -> int:
    return max(1, len(set(_cpuinfo("physical id"))))


class _ProcessTree:
    """Estimate from the CPU seconds of this process, its children, and those already waited for."""

    joules_are: JoulesAre = "estimated"

    def __init__(self, now: float) -> None:
        self._started = now
        self._scanned = float("-inf")
        self._children: list[Any] = []
        self._cpu_seconds = 0.0
        self._baseline = self._read(now)

    def joules(self, now: float) -> float:
        return estimate(max(0.0, now - self._started), max(0.0, self._read(now) - self._baseline))

    def _read(self, now: float) -> float:
        import psutil

        if now - self._scanned >= SCAN_SECONDS:
            self._scanned = now
            self._children = psutil.Process().children(recursive=True)
        own = os.times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._children:
            try:
                times = child.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        # The seconds of a child that was killed and never waited for vanish; keep those already counted.
        self._cpu_seconds = max(self._cpu_seconds, total)
        return self._cpu_seconds


class _Rapl:
    """codecarbon's reader of the RAPL counters, which knows their wraps, mirrored dies and permissions."""

    joules_are: JoulesAre = "measured"

    def __init__(self, reader: Any, time_type: Any, now: float) -> None:
        self._reader, self._time, self._now = reader, time_type, now
        self._joules = 0.0
        reader.start()

    def joules(self, now: float) -> float:
        if now > self._now:
            details = self._reader.get_cpu_details(self._time.from_seconds(now - self._now))
            self._now = now
            kwh = sum(value for name, value in details.items() if name.startswith("Processor Energy Delta"))
            self._joules += float(kwh) * 3.6e6
        return self._joules


def package_counter(now: float) -> _Rapl | None:
    """The RAPL counters, if the kernel has them and lets us read them."""
    if not Path("/sys/class/powercap").is_dir():
        return None
    try:
        from codecarbon.core.cpu import IntelRAPL, is_rapl_available
        from codecarbon.core.units import Time

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        return _Rapl(IntelRAPL(), Time, now) if is_rapl_available() else None
    except (ImportError, OSError, SystemError):
        return None


class _Board:
    """One NVIDIA board by NVML: the counter, or the integral of its power between two readings."""

    joules_are: JoulesAre = "measured"

    def __init__(self, nvml: Any, handle: Any, limit_watts: float, now: float) -> None:
        self._nvml, self._handle, self._limit_watts, self._now = nvml, handle, limit_watts, now
        self._joules = 0.0
        self._counter = self._read_counter()
        self._watts = self._read_watts()

    def joules(self, now: float) -> float:
        before, self._counter = self._counter, self._read_counter()
        watts = self._watts
        if self._counter is None or before is None or self._counter < before:
            # No counter, or one that was reset with its driver: use the mean of the power at both ends.
            self.joules_are = "estimated"
            self._watts = self._read_watts()
            self._joules += (watts + self._watts) / 2 * max(0.0, now - self._now)
        else:
            self._joules += (self._counter - before) / 1000
        self._now = max(now, self._now)
        return self._joules

    def _read_counter(self) -> int | None:
        """Millijoules since the driver was loaded; None without a counter, or if it reads zero."""
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) or None
        except self._nvml.NVMLError:
            return None

    def _read_watts(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000
        except self._nvml.NVMLError:
            return self._limit_watts


class _Limit:
    """A board without readings: its power limit times the time, an upper bound."""

    joules_are: JoulesAre = "estimated"

    def __init__(self, watts: float, now: float) -> None:
        self._watts, self._started = watts, now

    def joules(self, now: float) -> float:
        return self._watts * max(0.0, now - self._started)


def _gpus(device: Device, devices: int, now: float) -> list[_Source]:
    """The first `devices` boards that torch sees, or as many limits where NVML does not answer."""
    watts = device.watts or _WATTS_PER_BOARD
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [_handle(pynvml, index) for index in range(devices)]
        return [_Board(pynvml, handle, watts, now) for handle in handles]
    except Exception:  # NVML fails in many ways without a driver; no run should stop for its watts
        return [_Limit(watts, now) for _ in range(devices)]


def _handle(nvml: Any, index: int) -> Any:
    """The board behind torch's device `index`: by its UUID, as CUDA_VISIBLE_DEVICES renumbers them."""
    torch = sys.modules.get("torch")
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None) if torch is not None else None
    if uuid is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
