"""The catalogue of devices (hardware.yaml): speed, power, hourly price, and the sources."""

from __future__ import annotations

import difflib
import functools
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.limits import shortened
from farthing.base.machine import cpu_cores, memory_limit
from farthing.base.processor import sysctl

_VENDOR_WORDS = {"nvidia", "amd", "geforce", "tesla", "instinct", "gpu", "graphics"}


@dataclass(frozen=True)
class Price:
    """Dollars per device-hour, and the source."""

    usd: float
    kind: str
    source: str
    date: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.source}, {self.date}" if self.kind != "assumed" else self.source


@dataclass(frozen=True)
class Device:
    """A device of the catalogue, or the one found in this machine."""

    name: str
    kind: str
    """"gpu", "cpu", "tpu", "asic" or "apple"."""
    aliases: tuple[str, ...] = ()
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    """Dense FLOP/s by dtype: float32, float16, bfloat16, float8."""
    measured_flops: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s of the best measured matrix product, by dtype."""
    memory_bytes: int = 0
    """0 when it is not known, like the next two."""
    bytes_per_second: float = 0.0
    link_bytes_per_second: float = 0.0
    """One way, between the devices of a node; 0 when it is not known."""
    watts: float = 0.0
    cores: int = 0
    """Logical cores the figures are for; CPUs only."""
    prices: tuple[Price, ...] = ()
    """The first is the default."""
    source: str = ""
    evidence: str = ""
    notes: str = ""


@functools.cache
def catalogue() -> tuple[Device, ...]:
    """All devices of hardware.yaml, in its order."""
    import yaml

    text = resources.files("farthing.cost").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return tuple(_device(entry) for entry in yaml.safe_load(text))


def find(name: str) -> Device:
    """Find the catalogue's device by name, alias or part of a name: "h100", "A100-SXM4-80GB", "rtx 4090".

    The first match in the catalogue wins. Raises UserError that gives the nearest names.
    """
    key = _key(name)
    for device in catalogue():
        if key and key in _keys(device):
            return device
    for device in catalogue():
        if _tokens(name) and any(_tokens(name) <= _tokens(own) for own in (device.name, *device.aliases)):
            return device
    for device in catalogue():  # "rtx 4090 24GB": the memory it has anyway
        rest = _tokens(name) - {f"{round(device.memory_bytes / 1e9)}gb"}
        if rest and any(rest <= _tokens(own) for own in (device.name, *device.aliases)):
            return device
    raise UserError(f"there is no device called {shortened(name)!r}{_nearest(name)}")


def rate(device: Device, overrides: Mapping[str, float] | None = None) -> tuple[float, str]:
    """Dollars per device-hour and their source, given a recipe's `rates`.

    An override's key is any name of the device that `find` takes; "a100" covers every A100, and the longest
    key that fits wins. Raises UserError for a price that is not above 0, a key that is not a device, and a device
    without a price.
    """
    chosen: str | None = None
    for key, usd in (overrides or {}).items():
        if isinstance(usd, bool) or not isinstance(usd, int | float) or not 0 < usd < float("inf"):
            raise UserError(f"rates gives {key}: {usd!r}, but an hourly price must be a number above 0")
        if not means(key, device):
            find(key)
        elif chosen is None or len(_key(key)) > len(_key(chosen)):
            chosen = key
    if chosen is not None:
        assert overrides is not None
        usd = float(overrides[chosen])
        # The catalogue's figure keeps its source when a recipe repeats it.
        known = [price for price in device.prices if price.usd == usd]
        return usd, str(known[0]) if known else "set in the recipe"
    if not device.prices:
        short = device.aliases[0] if device.aliases else device.name
        raise UserError(f"no price is known for {device.name}: write rates: {{{short}: 1.25}} in the recipe")
    return device.prices[0].usd, str(device.prices[0])


def means(key: str, device: Device) -> bool:
    """Whether a key of `rates` names this device: by its name, an alias, or the words of its name."""
    return _key(key) in _keys(device) or (bool(_tokens(key)) and _tokens(key) <= _tokens(device.name))


def named(name: str) -> Device:
    """The device that a ledger line names: the catalogue's, or a bare one with only that name."""
    for device in catalogue():
        if device.name == name:
            return device
    is_cpu = name.startswith("cpu")
    return Device(name=name, kind="cpu" if is_cpu else "gpu", aliases=("cpu",) if is_cpu else ())


def detect(device: str = "auto") -> Device:
    """The device of this machine that `device` names (`cpu`, `cuda:N`); `auto` is torch's current CUDA device if there
    is one, else the CPU.

    A GPU missing from the catalogue has the name and memory that torch reports, and no price. A CPU is called
    "cpu: MODEL"; its rate, power and speed are the catalogue's, scaled to the cores this process may use.
    """
    torch = sys.modules.get("torch")
    if device != "cpu" and torch is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(None if device == "auto" else device)
        try:
            return find(properties.name)
        except UserError:
            return Device(name=properties.name, kind="gpu", memory_bytes=int(properties.total_memory))
    return _this_cpu()


def cpu_model() -> str:
    """The CPU's name from the system; on Linux on ARM its implementer and part numbers; else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(model name|CPU implementer|CPU part)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" in fields:
        return fields["model name"].strip()
    if "CPU part" in fields:
        return f"{platform.machine()} {fields.get('CPU implementer', '')}:{fields['CPU part']}"
    apple = sysctl("-n", "machdep.cpu.brand_string").strip()
    return apple or platform.processor() or platform.machine() or "unknown"


def _this_cpu() -> Device:
    import psutil

    entry, cores = find("cpu"), cpu_cores()
    scale = cores / entry.cores
    return replace(
        entry,
        name=f"cpu: {cpu_model()}",
        aliases=("cpu", *entry.aliases),
        cores=cores,
        watts=entry.watts * scale,
        peak_flops={dtype: flops * scale for dtype, flops in entry.peak_flops.items()},
        measured_flops={dtype: flops * scale for dtype, flops in entry.measured_flops.items()},
        memory_bytes=int(min(psutil.virtual_memory().total, memory_limit())),
        prices=tuple(_scaled(price, cores, scale) for price in entry.prices),
        notes=f"speed and power scaled from {entry.cores} to {cores} cores, not measured on this machine",
    )


def _scaled(price: Price, cores: int, scale: float) -> Price:
    if scale == 1:
        return price
    # Rounded, since readers expect 0.04 times a whole number.
    per_core = price.usd * scale / cores
    return replace(price, usd=round(price.usd * scale, 6), kind=f"on demand, {cores} vCPUs at {per_core:g}")


def _device(entry: Mapping[str, Any]) -> Device:
    def flops(key: str) -> dict[str, float]:
        return {dtype: tera * 1e12 for dtype, tera in entry.get(key, {}).items()}

    return Device(
        name=entry["name"],
        kind=entry["kind"],
        aliases=tuple(str(alias) for alias in entry["aliases"]),
        peak_flops=flops("peak_tflops"),
        measured_flops=flops("measured_tflops"),
        memory_bytes=int(entry["memory_gb"] * 1e9),
        bytes_per_second=entry["memory_gb_s"] * 1e9,
        link_bytes_per_second=entry.get("link_gb_s", 0) * 1e9,
        watts=float(entry["watts"]),
        cores=entry.get("cores", 0),
        prices=tuple(
            Price(float(p["usd"]), p["kind"], p["source"], p["date"]) for p in entry.get("prices", [])
        ),
        source=entry["source"],
        evidence=entry["evidence"],
        notes=entry.get("notes", ""),
    )


def _tokens(name: str) -> frozenset[str]:
    """The words of a name that distinguish devices: "NVIDIA H100 80GB HBM3" -> h100, 80gb, hbm3."""
    return frozenset(re.findall(r"[a-z0-9]+", name.lower())) - _VENDOR_WORDS


def _key(name: str) -> str:
    """A name without its vendor, spaces and dashes, so that "RTX-4090" is "rtx4090"."""
    return "".join(word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _VENDOR_WORDS)


def _keys(device: Device) -> set[str]:
    return {_key(own) for own in (device.name, *device.aliases)}


def _nearest(name: str) -> str:
    short = [device.name if device.kind == "cpu" else device.aliases[0] for device in catalogue()]
    near = difflib.get_close_matches(_key(name), short, n=3, cutoff=0.6)
    return f": did you mean {', '.join(near)}?" if near else f": the names known are {', '.join(short)}"


def peak(device: Device) -> float:
    """The dense 16-bit peak in FLOP/s, the reference for utilisation, also in FP8 training."""
    known = device.peak_flops
    return known.get("bfloat16") or known.get("float16") or known.get("float32") or 0.0
