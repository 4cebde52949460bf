"""Device and dtype of this process: the one place that chooses them, and says why.

`choose` turns what a recipe or a flag asks for (`auto`, `cpu`, `cuda:1`; `auto`, `bfloat16`, `float32`) into a
`Place`. Weights are bfloat16 in every model folder; the dtype here is the one that products are computed in. bfloat16
is chosen where the hardware has instructions for it and a probe finds it faster: without them it is emulated, at an
eighth of float32's speed on AVX2.

torch is imported where it is used, so that recipes and plans load without it.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from farthing.base import processor
from farthing.base.errors import UserError
from farthing.base.limits import shortened
from farthing.base.machine import memory_left

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float32")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_MEANT = {
    "bf16": "bfloat16", "half": "bfloat16", "fp16": "bfloat16", "float16": "bfloat16", "fp8": "bfloat16",
    "int8": "bfloat16", "fp32": "float32", "f32": "float32", "float": "float32", "fp64": "float32",
    "float64": "float32", "double": "float32",
    "gpu": "cuda", "nvidia": "cuda", "tpu": "cpu", "mps": "cpu", "metal": "cpu", "xpu": "cpu", "rocm": "cuda",
}  # fmt: skip
_ROWS, _INPUTS, _OUTPUTS = 256, 576, 1536  # of the probe's product: a layer of a small network


@dataclass(frozen=True)
class Place:
    """Device and dtype of a network's computation.

    Attributes:
        device: `cpu` or `cuda:N`, as torch reads it.
        dtype: `bfloat16` or `float32`.
        why: one sentence on the choice of dtype.
    """

    device: str
    dtype: str
    why: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


Amount = TypeVar("Amount", "int", "float", "torch.Tensor")


class Ranks(Protocol):
    """The processes that train one model together, seen from one of them.

    Whatever divides a loss, decides for all or is booked is a total over them; each works on its own share of a batch.
    """

    @property
    def index(self) -> int:
        """Of this process, from 0."""

    @property
    def count(self) -> int: ...

    @property
    def device(self) -> str:
        """Device of this process, as torch reads it."""

    def share(self, items: int) -> slice:
        """This process's part of so many items; the parts of all processes are disjoint and cover them."""

    def total(self, amount: Amount) -> Amount:
        """The sum of every process's amount. All of them must call it, in the same order."""


@dataclass(frozen=True)
class Alone:
    """One process, which has every item and is every total."""

    device: str
    index: int = 0
    count: int = 1

    def share(self, items: int) -> slice:
        return slice(0, items)

    def total(self, amount: Amount) -> Amount:
        return amount


def choose(device: str = "auto", dtype: str = "auto") -> Place:
    """Resolve a device and a dtype on this machine.

    Raises:
        UserError: for an unknown name, a device that is absent, and as `processor.isa`.
    """
    place = _device(device)
    _checked("dtype", check_dtype, dtype)
    if dtype != "auto":
        processor.isa()  # refuses a FARTHING_ISA that makes no sense
        return Place(place, dtype, "asked for")
    return Place(place, *_fastest(place))


def check_device(name: str) -> str:
    """Return `name` if it can be a device's. Raises UserError with the nearest name otherwise."""
    if not _DEVICE.fullmatch(name):
        hint = _nearest(name, ("auto", "cpu", "cuda"))
        raise UserError(f"must be auto, cpu, cuda or cuda:N, got {shortened(name)!r}{hint}")
    return name


def check_dtype(name: str) -> str:
    """Return `name` if it is a dtype to compute in. Raises UserError with the nearest name otherwise."""
    if name not in DTYPES:
        raise UserError(f"must be auto, bfloat16 or float32, got {shortened(name)!r}{_nearest(name, DTYPES)}")
    return name


def _device(name: str) -> str:
    import torch

    _checked("device", check_device, name)
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return f"cuda:{torch.cuda.current_device()}" if count else "cpu"
    if not count:
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise UserError(f"device: {name}, but {build}; use device: cpu, or look at `farthing doctor`")
    number = int(name.partition(":")[2] or torch.cuda.current_device())
    if number >= count:
        raise UserError(f"device: {name}, but there are {count} GPUs, numbered from 0; use cuda:{count - 1}")
    return f"cuda:{number}"


def _checked(key: str, check: Callable[[str], str], name: str) -> None:
    """Check a name, and prefix its mistake with its key."""
    try:
        check(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _nearest(name: str, known: tuple[str, ...]) -> str:
    meant = _MEANT.get(name.lower())
    near = [meant] if meant in known else difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@functools.cache
def _fastest(device: str) -> tuple[str, str]:
    """The dtype of the faster products, and why."""
    if not has_bfloat16(device):
        what = processor.isa() if device == "cpu" else "a GPU before compute capability 8.0"
        return "float32", f"{what} has no instructions for bfloat16"
    rates = {name: rate / 1e9 for name, rate in product_rates(device).items()}
    name = max(rates, key=lambda dtype: rates[dtype])
    return name, f"products: bfloat16 {rates['bfloat16']:,.0f} GFLOPS, float32 {rates['float32']:,.0f}"


def has_bfloat16(device: str) -> bool:
    """Whether the hardware has bfloat16 instructions, fast or not."""
    import torch

    if device == "cpu":
        if processor.isa() in processor.BFLOAT16:
            return True
        # Linux does not list AVX-NE-CONVERT; torch asks the processor itself
        capabilities = getattr(torch.cpu, "get_capabilities", None)
        lesser = bool(os.environ.get("FARTHING_ISA"))
        return capabilities is not None and not lesser and bool(capabilities().get("avx_ne_convert"))
    return torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)


def product_rates(device: str, seconds: float = 0.02) -> dict[str, float]:
    """FLOP/s of a layer's product in bfloat16 and in float32, alternating; the best of about `seconds` each, since
    other load can only slow it."""
    import torch

    operands = {
        name: tuple(
            torch.ones(shape, dtype=getattr(torch, name), device=device)
            for shape in ((_ROWS, _INPUTS), (_OUTPUTS, _INPUTS))
        )
        for name in ("bfloat16", "float32")
    }
    times: dict[str, list[float]] = {name: [] for name in operands}
    with torch.inference_mode():
        for _ in range(50):
            for name, (x, weight) in operands.items():
                if sum(times[name][1:]) > seconds:
                    continue
                _wait(device)
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                _wait(device)
                times[name].append(time.perf_counter() - started)
    best = {name: min(took[1:]) for name, took in times.items()}  # the first plans and wakes threads
    return {name: 2 * _ROWS * _INPUTS * _OUTPUTS / took for name, took in best.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def free_memory(device: str) -> int:
    """Bytes that a process can still allocate on a device, by the system or by the container's limit.

    Memory that torch holds on a GPU without using it counts as free, and so does the page cache that a container's
    limit includes.
    """
    if device != "cpu":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(min(psutil.virtual_memory().available, memory_left()))


def reference_only() -> bool:
    """Whether FARTHING_KERNELS asks for plain torch everywhere (`reference`) or fast paths (`auto`, the default).

    Raises:
        UserError: for another value.
    """
    asked = os.environ.get("FARTHING_KERNELS") or "auto"
    if asked not in ("auto", "reference"):
        raise UserError(f"FARTHING_KERNELS={asked}: must be auto or reference")
    return asked == "reference"
