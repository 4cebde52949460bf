"""Calibrations: the measured figures behind plans for this machine, kept with their date.

`Calibration` holds what `farthing calibrate` found in one dtype: the rate of matrix products, memory bandwidth, writing
to disk, and what the parts of this program's own network take a row. `plans.calibrate` takes the measurements of the
network; those of the machine are here. Each starts small and grows while it fits in the seconds it is given, so that
a slow machine is measured with less and not for longer.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import cache_folder, sha256, write_json
from farthing.base.limits import Unwritable, unwritable

DTYPES = ("float32", "bfloat16")
_FORM = 3  # raised when the fields change, so that what an older version wrote is measured again
# Rows of a square product. The smallest is a quarter of a second at 1 GFLOP/s; those below it say little on a machine
# that others use as well, where waking a thread can take longer than they do.
_SMALLEST, _LARGEST = 512, {"cpu": 2048, "gpu": 8192}
_COPIED = (32 << 20, 256 << 20)  # bytes, beyond most caches
_WRITTEN = (1 << 20, 64 << 20)  # bytes
_ENOUGH = 3  # runs of the largest size
_EXPECTED = 1.5  # times the proportional estimate: room for a size that is slower than expected


@dataclass(frozen=True)
class Pace:
    """Seconds of one kind of pass: `fixed` once a layer, `flop` for each FLOP of a layer's rows, and the same
    for what comes after the layers: the head, its softmax, sampling or loss."""

    fixed: float
    flop: float
    head_fixed: float
    head_flop: float

    def seconds(self, layers: int, layer_flops: float, head_flops: float) -> float:
        """Of a pass through `layers` layers; `layer_flops` are those of all layers and rows together."""
        return layers * self.fixed + layer_flops * self.flop + self.head_fixed + head_flops * self.head_flop


@dataclass(frozen=True)
class Calibration:
    """Measurements of one machine in one dtype."""

    date: str
    device: str
    dtype: str
    """Dtype in which the network was timed: `float32` or `bfloat16`."""
    instructions: str
    """The set of instructions in use, and "plain torch" where fast paths were switched off."""
    threads: int
    torch: str
    took: float
    """Seconds spent measuring."""
    timed: int
    """Tokens of the largest pass that was timed; 0 where not even the smallest was done in time, and the figures of
    the network are worked out from those of the machine."""
    gemm_float32: float
    """FLOP/s of a square matrix product."""
    gemm_bfloat16: float
    bandwidth: float
    """Bytes a second, read and written, of copying in memory."""
    disk: float
    """Bytes a second that a checkpoint is written with, checksum and flush included."""
    small_op: float
    """Seconds of an operation on next to nothing."""
    decode: Pace
    """One token for every row."""
    prefill: Pace
    train: Pace
    """Forward and backward pass; in FLOPs of both together."""
    optimizer: float
    """Seconds a parameter of clipping and one AdamW step."""
    narrow: float = 0.0
    """Seconds a FLOP in training narrow layers (`plans.narrow`); 0 where no time was left for them."""
    route: float = 0.0
    """Seconds a token in training a layer with experts, beyond its FLOPs."""

    def as_json(self) -> dict[str, Any]:
        return {"form": _FORM, **asdict(self)}


def load(dtype: str, folder: Path | None = None) -> Calibration | None:
    """The calibration kept for that dtype; None if there is none, or it cannot be read."""
    try:
        data = json.loads(path(dtype, folder).read_text())
        if data.pop("form") != _FORM:
            return None
        for name in ("decode", "prefill", "train"):
            data[name] = Pace(**data[name])
        return Calibration(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save(calibration: Calibration, folder: Path | None = None) -> Path:
    """Keep the calibration for later plans; returns the file. Raises UserError when it cannot be written."""
    file = path(calibration.dtype, folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, calibration.as_json())
    except (OSError, Unwritable) as error:
        raise UserError(
            f"{file}: cannot be written ({unwritable(error) or error}); set FARTHING_CACHE to a folder"
        ) from None
    return file


def path(dtype: str, folder: Path | None = None) -> Path:
    """File of the calibration in a dtype, in $FARTHING_CACHE or ~/.cache/farthing."""
    return (folder or cache_folder()) / f"calibration-{dtype}.json"


# ---- the machine ----


def grow(
    work: Callable[[int], float],
    sizes: tuple[int, int],
    cost: Callable[[int], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """The shortest time of each size: sizes double from the first to the last while what they are expected to take
    fits in `seconds` altogether. The smallest is done twice, however slow: the first time also wakes and plans.

    Args:
        work: does the work of a size once, and says what the part of interest took.
        cost: of a size, in any unit; what two sizes took tells what time grows with it. Before there are two, time is
            expected to be in proportion.
    """
    size, largest = sizes
    until = clock() + seconds
    found: dict[int, float] = {}
    runs, last, smaller, whole = 0, 0, 0.0, float("inf")
    while True:
        started = clock()
        took = work(size)
        whole = min(whole, clock() - started)
        found[size] = min(found.get(size, took), took)
        runs, last = runs + 1, last + 1
        left = until - clock()
        growth = (cost(2 * size) - cost(size)) / (cost(size) - cost(size // 2))
        most = min(growth * max(0.0, whole - smaller), (cost(2 * size) / cost(size) - 1) * whole)
        if 2 * size <= largest and _EXPECTED * (whole + most) <= left:
            size, smaller, whole, last = 2 * size, whole, float("inf"), 0
        elif (runs > 1 and whole > left) or (2 * size > largest and last == _ENOUGH):
            return found


def products(dtype: str, seconds: float, device: str = "cpu", smallest: int = _SMALLEST) -> float:
    """FLOP/s of a square matrix product: the best of those that fit in `seconds`, from `smallest` rows on."""
    import torch

    def work(size: int) -> float:
        a, b = (torch.ones(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
        return timed(lambda: torch.nn.functional.linear(a, b), device)

    with torch.inference_mode():
        found = grow(work, (smallest, _LARGEST["cpu" if device == "cpu" else "gpu"]), _cubed, seconds)
    return max(2 * size**3 / took for size, took in found.items())


def _cubed(size: int) -> float:
    return float(size) ** 3


def bandwidth(seconds: float, device: str = "cpu") -> float:
    """Bytes a second, read and written, of copying the largest block that fits in `seconds` and an eighth of what
    memory is free."""
    import torch

    from farthing.base.device import free_memory

    smallest, largest = _COPIED
    largest = max(smallest, min(largest, free_memory(device) // 8))

    blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(size: int) -> float:
        if size not in blocks:
            one = torch.ones(size, dtype=torch.uint8, device=device)
            blocks.clear()
            blocks[size] = one, torch.ones_like(one)
        source, target = blocks[size]
        return timed(lambda: target.copy_(source), device)

    found = grow(work, (smallest, largest), float, seconds)
    size = max(found)
    return 2 * size / found[size]


def small_op() -> float:
    """Seconds of an operation on next to nothing."""
    import torch

    one = torch.ones(16)
    return min(timed(lambda: [one + one for _ in range(300)]) for _ in range(4)) / 300


def disk(seconds: float, folder: Path | None = None) -> float:
    """Bytes a second of the largest file that fits in `seconds`: written, flushed to disk, and read again for its
    checksum. In `folder`, by default where the calibration is kept, or beside other temporary files if none may be
    written there."""
    where = folder or cache_folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=where).close()
    except OSError:
        where = Path(tempfile.gettempdir())
    block = os.urandom(_WRITTEN[0])

    def write(size: int) -> None:
        with tempfile.NamedTemporaryFile(dir=where) as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            sha256(Path(file.name))

    found = grow(lambda size: timed(lambda: write(size)), _WRITTEN, float, seconds)
    size = max(found)
    return size / found[size]


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of doing something once; on a GPU until it is done there."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
