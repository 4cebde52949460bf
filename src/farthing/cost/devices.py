"""The catalogue of devices (hardware.yaml, cards.yaml, apple.yaml): speed, power, hourly price, and the sources."""

from __future__ import annotations

import difflib
import functools
import json
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

_FILES = ("hardware.yaml", "cards.yaml", "apple.yaml")
_VENDOR_WORDS = {
    "nvidia", "amd", "geforce", "tesla", "instinct", "gpu", "graphics", "generation", "apple", "chip", "huawei",
}  # fmt: skip

# Keys of a device of one's own: what the number is, and the least and most that it can be meant to be.
_OWN = {
    "flops": ("FLOP/s in bf16 without sparsity", 1e9, 1e18),
    "memory": ("bytes", 1e8, 1e14),
    "usd": ("dollars an hour", 1e-6, 1e6),
    "bandwidth": ("bytes a second", 1e8, 1e15),
    "watts": ("watts", 0.1, 1e6),
}
_REQUIRED = ("flops", "memory")
_SAME_MEMORY = 0.15  # share by which what a driver reports may differ from 1e9 bytes a "GB" of the card
_OWN_FORM = 'write {"flops": 1e15, "memory": 80e9, "usd": 2.0}, and "name", "bandwidth" or "watts" if known'


@dataclass(frozen=True)
class Price:
    """Dollars per device-hour, and the source."""

    usd: float
    kind: str
    source: str
    date: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.kind, self.source, self.date) if part)


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
    """All devices of the files, in their order."""
    import yaml

    folder = resources.files("farthing.cost")
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in _FILES]
    return tuple(_device(entry) for text in texts for entry in yaml.safe_load(text))


def find(name: str) -> Device:
    """Find the catalogue's device by name, alias or part of a name: "h100", "A100-SXM4-80GB", "Tesla T4", "rtx 4090".

    JSON gives a device of one's own: {"flops": 1e15, "memory": 80e9, "usd": 2.0}, see `own`. Raises UserError for a
    name that is nobody's or that several devices have, with the candidates.
    """
    if name.lstrip().startswith("{"):
        return own(name)
    key, words = _key(name), _tokens(name)
    for device in catalogue():
        if key and key in _keys(device):
            return device
    fitting = [device for device in catalogue() if words and _is_part(words, device)]
    if not fitting:  # "rtx 4090 24GB": the memory it has anyway
        fitting = [
            device
            for device in catalogue()
            if (rest := words - {f"{round(device.memory_bytes / 1e9)}gb"})
            and rest != words
            and _is_part(rest, device)
        ]
    if len(fitting) > 1:
        raise UserError(f"{shortened(name)!r} may be any of {', '.join(map(_short, fitting))}; say which")
    if not fitting:
        raise UserError(f"there is no device called {shortened(name)!r}{_nearest(name)}")
    return fitting[0]


def own(text: str) -> Device:
    """The device that JSON text describes: `flops` (bf16, dense, a second) and `memory` (bytes), and if known `usd` (an
    hour), `name`, `bandwidth` (bytes a second) and `watts`.

    Bandwidth and watts that are not given are in the proportion to its FLOP/s that they have in an H100. Raises
    UserError for text that is not this.
    """
    said = f"the device {shortened(text)!r}"
    try:
        given = dict(pairs := json.loads(text, object_pairs_hook=list))
    except (ValueError, RecursionError):
        raise UserError(f"{said} is not JSON; {_OWN_FORM}") from None
    if len(given) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise UserError(f"{said} gives {shortened(twice)} twice")
    for key in _REQUIRED:
        if key not in given:
            raise UserError(f"{said} has no {key} ({_OWN[key][0]}); {_OWN_FORM}")
    for key, value in given.items():
        if key == "name":
            if not isinstance(value, str) or not value.strip() or not value.isprintable():
                raise UserError(f"{said}: its name has to be text")
        elif key not in _OWN:
            raise UserError(f"{said} has no use for {shortened(key)!r}; {_OWN_FORM}")
        else:
            unit, least, most = _OWN[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise UserError(f"{said}: {key} has to be {unit}, a number from {least:g} to {most:g}")
    usual = find("h100")
    scale = given["flops"] / peak(usual)
    assumed = " and ".join(key for key in ("bandwidth", "watts") if key not in given)
    return Device(
        name=given.get("name", "own device").strip(),
        kind="gpu",
        peak_flops={"bfloat16": float(given["flops"])},
        memory_bytes=int(given["memory"]),
        bytes_per_second=float(given.get("bandwidth", usual.bytes_per_second * scale)),
        watts=float(given.get("watts", round(usual.watts * scale))),
        prices=(Price(float(given["usd"]), "given", "in the device's JSON", ""),) if "usd" in given else (),
        source=f"given; {assumed} in an H100's proportion to it" if assumed else "given",
        evidence="given",
    )


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
        raise UserError(
            f"no price is known for {device.name}: write rates: {{{_short(device)}: 1.25}} in the recipe"
        )
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
        return _this_gpu(properties.name, int(properties.total_memory))
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


def _this_gpu(name: str, memory: int) -> Device:
    """The catalogue's device of this name if it has this memory. A card of two dies is two devices to torch."""
    for called in (name, f"{name} one die"):
        try:
            found = find(called)
        except UserError:
            continue
        if abs(memory / found.memory_bytes - 1) < _SAME_MEMORY:
            return found
    return Device(name=name, kind="gpu", memory_bytes=memory)


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


def _words(name: str) -> list[str]:
    """The words of a name that distinguish devices: "NVIDIA H100 80 GB HBM3" -> h100, 80gb, hbm3."""
    name = re.sub(r"\b([0-9]+) ?g(i?b)?\b", r"\1gb", name.lower())
    return [word for word in re.findall(r"[a-z0-9]+", name) if word not in _VENDOR_WORDS]


def _tokens(name: str) -> frozenset[str]:
    return frozenset(_words(name))


def _key(name: str) -> str:
    """A name without its vendor, spaces and dashes, so that "RTX-4090" is "rtx4090"."""
    return "".join(_words(name))


def _keys(device: Device) -> set[str]:
    return {_key(own) for own in (device.name, *device.aliases)}


def _is_part(words: frozenset[str], device: Device) -> bool:
    """Whether one of the device's names has all these words."""
    return any(words <= _tokens(own) for own in (device.name, *device.aliases))


def _short(device: Device) -> str:
    return device.name if device.kind == "cpu" or not device.aliases else device.aliases[0]


_NAMED = 16  # devices in a message


def _nearest(name: str) -> str:
    known = {key: device for device in catalogue() if device.kind != "cpu" for key in _keys(device)}
    near = difflib.get_close_matches(_key(name), known, n=6, cutoff=0.6)
    if near:
        return f": did you mean {', '.join(dict.fromkeys(_short(known[key]) for key in near))}?"
    names = list(map(_short, catalogue()))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f": the names known are {', '.join(names[:_NAMED])}{more}; or describe your own as JSON"


def peak(device: Device) -> float:
    """The dense 16-bit peak in FLOP/s, the reference for utilisation, also in FP8 training."""
    known = device.peak_flops
    return known.get("bfloat16") or known.get("float16") or known.get("float32") or 0.0
