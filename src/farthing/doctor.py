"""`farthing doctor`: the machine, the choices made for it, and what works.

Everything is examined on its own, since this is for broken machines: what cannot be found out is None, or an empty
list. The output can be posted in public. It shows the home folder as `~`, no name of a user or host, no token, no
address, and only Farthing's own environment variables.
"""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from farthing.base import processor
from farthing.base.device import Place, choose, free_memory, reference_only
from farthing.base.files import cache_folder
from farthing.cost import devices
from farthing.plans import measured as calibration

T = TypeVar("T")

HUB_SECONDS = 3.0
COUNTED = 1.0  # seconds to spend summing a cache's size
# seconds to measure products in the chosen dtype, in the other one, and memory
CHOSEN, OTHER, COPIED = 0.5, 0.15, 0.2
_SHOWN = ("FARTHING_ISA", "FARTHING_KERNELS")  # settings whose values reveal nothing private


def examine(*, offline: bool = False, runs: Path = Path("runs")) -> dict[str, Any]:
    """Everything that `farthing doctor` prints, ready for JSON: bytes, bytes a second and FLOP/s.

    Args:
        offline: leaves the model hub alone.
        runs: where runs are kept.

    Raises:
        UserError: for an invalid FARTHING_ISA or FARTHING_KERNELS.
    """
    used = processor.isa()
    plain = reference_only()
    hub = _Hub(offline)
    found: dict[str, Any] = {
        "version": _try(lambda: importlib.metadata.version("farthing")),
        "settings": _try(_settings),
        "machine": _machine(used),
        "disks": [_disk("runs", lambda: runs), _disk("cache", cache_folder)],
        "gpus": _try(_gpus) or [],
        "torch": _try(_torch),
    }
    place = _try(choose)
    device = place.device if place else "cpu"
    found["chosen"] = place and {"device": place.device, "dtype": place.dtype, "why": place.why}
    found["measured"] = {
        "device": device,
        **{f"{dtype}_flops": _products(dtype, place) for dtype in calibration.DTYPES},
        "bytes_per_second": _try(lambda: calibration.bandwidth(COPIED, device)),
    }
    found["plain_torch"] = plain
    found["fast_paths"] = _try(lambda: _fast_paths(device, place.dtype if place else "float32")) or []
    found["optional"] = _try(optional) or []
    found["caches"] = [_cache("farthing", cache_folder), _cache("hub", _hub_cache)]
    found["hub"] = hub.answer()
    found["calibrations"] = _try(_calibrations) or []
    cleaned: dict[str, Any] = _clean(found)
    return cleaned


def _try(look: Callable[[], T]) -> T | None:
    """The function's result, or None if it fails for any reason."""
    try:
        return look()
    except Exception:
        return None


# ---- the machine ----


def _machine(used: str) -> dict[str, Any]:
    return {
        "processor": _try(devices.cpu_model),
        "architecture": platform.machine(),
        "cores": _try(devices.cpu_cores),
        "instructions": list(processor.levels()),
        "instructions_used": used,
        "memory_bytes": _try(_all_memory),
        "free_memory_bytes": _try(lambda: free_memory("cpu")),
        "system": _try(_system),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _all_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _system() -> str:
    name = platform.system()
    if name == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    libc = " ".join(platform.libc_ver()).strip()
    return f"{name} {platform.release()}" + (f", {libc}" if libc else "")


def _settings() -> dict[str, str]:
    """Farthing's own variables: their values where these are words of ours, else that they are set."""
    names = sorted(name for name in os.environ if name.startswith("FARTHING_") and os.environ[name])
    return {name: os.environ[name] if name in _SHOWN else "set" for name in names}


def _disk(what: str, find: Callable[[], Path]) -> dict[str, Any]:
    """Free bytes where a folder is or would be, and whether it can be written."""

    def existing() -> Path:
        path = find().absolute()
        while not path.exists():
            path = path.parent
        return path

    return {
        "what": what,
        "path": _try(lambda: str(find().absolute())),
        "free_bytes": _try(lambda: shutil.disk_usage(existing()).free),
        "writable": _try(lambda: existing().is_dir() and os.access(existing(), os.W_OK)),
    }


def _gpus() -> list[dict[str, Any]]:
    """GPUs by what NVIDIA's driver says, also those that torch cannot use; or by what torch says, without a driver's
    tool."""
    return _try(_gpus_of_driver) or _gpus_of_torch()


def _gpus_of_driver() -> list[dict[str, Any]]:
    asked = "name,memory.total,compute_cap,driver_version"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=3, check=True,
    ).stdout  # fmt: skip
    rows = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.strip()]
    return [
        {"name": name, "memory_bytes": int(mib) << 20, "compute_capability": capability, "driver": driver}
        for name, mib, capability, driver in rows
    ]


def _gpus_of_torch() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_bytes": int(gpu.total_memory),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "driver": None,
        }
        for gpu in found
    ]


def _torch() -> dict[str, Any]:
    import torch

    backends = torch.backends
    onednn = re.search(r"MKL-DNN v([\w.]+)", torch.__config__.show())
    built = torch.version.cuda and f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return {
        "version": torch.__version__,
        "build": built or (f"ROCm {hip}" if hip else "CPU"),
        "gpus_usable": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "onednn": (onednn[1] if onednn else True) if backends.mkldnn.is_available() else None,
        "mkl": backends.mkl.is_available(),
        "openmp": backends.openmp.is_available(),
        "threads": torch.get_num_threads(),
        "capability": backends.cpu.get_cpu_capability(),
    }


def _fast_paths(device: str, dtype: str) -> list[dict[str, Any]]:
    import torch

    kernels: Any = importlib.import_module("farthing.model.kernels")
    found = kernels.status(device, getattr(torch, dtype))
    return [{"name": path.name, "on": path.on, "why": path.why} for path in found]


def _products(dtype: str, place: Place | None) -> float | None:
    seconds, smallest = (CHOSEN, 512) if place is None or dtype == place.dtype else (OTHER, 256)
    return _try(lambda: calibration.products(dtype, seconds, place.device if place else "cpu", smallest))


# ---- what is installed, kept and reachable ----


def optional() -> list[dict[str, Any]]:
    """The package's extras: missing parts of each, and the line that installs it."""
    from packaging.requirements import Requirement

    extras = importlib.metadata.metadata("farthing").get_all("Provides-Extra") or []
    needed = [Requirement(text) for text in importlib.metadata.requires("farthing") or []]

    def of(extra: str) -> list[Requirement]:
        own = [r for r in needed if r.marker and _only_for(r, extra)]
        inner = [name for r in own if r.name == "farthing" for name in r.extras if name != extra]
        return [r for r in own if r.name != "farthing"] + [r for name in inner for r in of(name)]

    found = []
    for extra in sorted(extras):
        missing = sorted({str(r).split(";")[0].strip() for r in of(extra) if not _has(r)})
        install = f"pip install 'farthing[{extra}]'"
        found.append({"name": extra, "installed": not missing, "missing": missing, "install": install})
    return found


def _only_for(requirement: Any, extra: str) -> bool:
    asked = [requirement.marker.evaluate({"extra": name}) for name in (extra, "")]
    return asked == [True, False]


def _has(requirement: Any) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(version, prereleases=True))


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cache(what: str, find: Callable[[], Path]) -> dict[str, Any]:
    size, whole = _try(lambda: _size(find())) or (None, True)
    return {"what": what, "path": _try(lambda: str(find().absolute())), "bytes": size, "whole": whole}


def _size(folder: Path) -> tuple[int, bool]:
    """Bytes of all files below, links not followed; and whether all were counted in time."""
    until, total = time.monotonic() + COUNTED, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += _try(partial(_length, os.path.join(parent, name))) or 0
        if time.monotonic() > until:
            return total, False
    return total, True


def _length(path: str) -> int:
    return os.lstat(path).st_size


class _Hub:
    """Ask whether the model hub answers, in the background."""

    def __init__(self, offline: bool) -> None:
        self.found: dict[str, Any] = {"reachable": None, "why": "skipped: --offline"}
        self.thread: threading.Thread | None = None
        if offline:
            return
        try:
            from huggingface_hub import constants
        except Exception as error:
            self.found["why"] = f"huggingface_hub cannot be imported ({type(error).__name__})"
            return
        if constants.HF_HUB_OFFLINE:
            self.found["why"] = "skipped: HF_HUB_OFFLINE is set"
            return
        self.found = {"reachable": False, "why": f"no answer in {HUB_SECONDS:.0f} s"}
        self.until = time.monotonic() + HUB_SECONDS + 0.5
        self.thread = threading.Thread(target=self._ask, args=(constants.ENDPOINT,), daemon=True)
        self.thread.start()

    def _ask(self, address: str) -> None:
        from huggingface_hub import get_session

        try:
            code = get_session().head(address, timeout=HUB_SECONDS).status_code
        except Exception as error:  # its text may hold the address of a proxy, with a password
            self.found = {"reachable": False, "why": type(error).__name__}
            return
        self.found = {"reachable": code < 500, "why": f"answers {code}"}

    def answer(self) -> dict[str, Any]:
        if self.thread is not None:
            self.thread.join(max(0.0, self.until - time.monotonic()))
        return self.found


def _calibrations() -> list[dict[str, Any]]:
    from farthing.plans.calibrate import instructions

    found = []
    for dtype in calibration.DTYPES:
        known = calibration.load(dtype)
        if known is not None:
            same = (known.device, known.instructions) == (devices.detect("cpu").name, instructions())
            found.append({"dtype": dtype, "date": known.date, "device": known.device, "holds": same})
    return found


# ---- what may be shown ----


def _clean(value: Any) -> Any:
    """Remove what identifies the owner from every text: the home folder, a user's name in a path, and the part before
    the @ of an address."""
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_clean(each) for each in value]
    return _cleaned(value) if isinstance(value, str) else value


def _cleaned(text: str) -> str:
    home = _try(Path.home)
    if home is not None:
        for folder in sorted({str(home), str(_try(home.resolve) or home)}, key=len, reverse=True):
            if len(folder) > 1:
                text = re.sub(rf"{re.escape(folder)}(?![^/\s:,;)'\"])", "~", text)
    users = {name for name in (_try(getpass.getuser), home.name if home else None) if name}
    for user in sorted(users, key=len, reverse=True):
        text = re.sub(rf"(?<=/){re.escape(user)}(?![^/\s:,;)'\"])", "USER", text)
    return re.sub(r"://[^/\s@]*@", "://", text)
