"""What a machine was measured to do: the figures behind plans for it, kept with their date.

`Calibration` holds what `farthing calibrate` found: the rate of matrix products, memory bandwidth, writing to
disk, and what the parts of this program's own network take a row. `plans.calibrate` takes the measurements of
the network, `machine` here those of the machine.
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

from farthing.errors import UserError

_FILE = "calibration.json"
_FORM = 1  # raised when the fields change, so that what an older version wrote is measured again
_GEMM = 2048
_COPIED = 256 << 20  # bytes, beyond any cache
_WRITTEN = 64 << 20
ENOUGH = 0.3


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
    """Measurements of one machine."""

    date: str
    device: str
    threads: int
    torch: str
    took: float
    """Seconds that measuring took."""
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

    def as_json(self) -> dict[str, Any]:
        return {"form": _FORM, **asdict(self)}


def load(folder: Path | None = None) -> Calibration | None:
    """What was measured on this machine before, or None: never, on other hardware, or unreadable."""
    try:
        data = json.loads(_path(folder).read_text())
        if data.pop("form") != _FORM:
            return None
        for name in ("decode", "prefill", "train"):
            data[name] = Pace(**data[name])
        return Calibration(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(calibration: Calibration, folder: Path | None = None) -> Path:
    """Keep it for later plans; returns the file. Raises UserError when it cannot be written."""
    path = _path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(calibration.as_json(), indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); set FARTHING_CACHE to a folder"
        ) from None
    return path


def machine() -> dict[str, float]:
    """Measure products, bandwidth, disk and small operations, in two to three seconds."""
    import torch

    found: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(_GEMM, _GEMM).to(dtype) for _ in range(2))
        found[f"gemm_{name}"] = 2 * _GEMM**3 / shortest(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source = torch.zeros(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["bandwidth"] = 2 * _COPIED / shortest(lambda: target.copy_(source))
    one = torch.ones(16)
    found["small_op"] = shortest(lambda: [one + one for _ in range(1000)]) / 1000
    found["disk"] = _WRITTEN / _write_seconds()
    return found


def shortest(work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of a few runs, after one to warm up: what others do to a machine only adds.

    A slow machine gets fewer runs: after `ENOUGH` seconds no other is begun.
    """
    work()
    found = [timed(work)]
    while len(found) < times and sum(found) < ENOUGH:
        found.append(timed(work))
    return min(found)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write_seconds() -> float:
    """Of a file beside the calibration: written, flushed to disk, and read again for its checksum."""
    import hashlib

    block = os.urandom(1 << 20)

    def write() -> None:
        with tempfile.TemporaryFile(dir=_existing(_path(None).parent)) as file:
            for _ in range(_WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            hashlib.file_digest(file, "sha256")

    return timed(write)


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _path(folder: Path | None) -> Path:
    """Beside what else Farthing keeps: $FARTHING_CACHE, or ~/.cache/farthing."""
    given = folder or os.environ.get("FARTHING_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "farthing") / _FILE
