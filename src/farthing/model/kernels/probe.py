"""Probes: a fast path is taken only if its requirements are met here and it matches its reference.

The answer is kept for each device type and dtype. It depends on no clock, so a run that is resumed decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farthing.base.device import reference_only

# How far a result may be from its reference in float32, as a share of its norm. Rounding gives a tenth of this,
# products in TF32 a fifth; a kernel that is wrong is off by more.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
TOLERANCE_HALF = 0.03


@dataclass(frozen=True)
class Status:
    """Whether a fast path is used, and why, in a few words."""

    name: str
    on: bool
    why: str


@dataclass(frozen=True)
class Kernel:
    """A fast path, its reference, and how to find out whether it works.

    Attributes:
        name: as `farthing doctor` prints it.
        does: what it is, in a few words.
        fast, reference: the same function of tensors, the second in plain torch.
        lacks: why it cannot run for a device type and a dtype, without running it; "" where it may.
        examples: tiny inputs, float32 on the CPU; gradients are compared too for those that require them.
    """

    name: str
    does: str
    fast: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    lacks: Callable[[torch.device, torch.dtype], str]
    examples: Callable[[], Sequence[tuple[Any, ...]]]

    def on(self, like: Tensor) -> bool:
        """Whether to use the fast path for tensors like this one."""
        return self.status(like.device, like.dtype).on

    def status(self, device: torch.device, dtype: torch.dtype) -> Status:
        key = (self.name, device.type, dtype)
        if key not in _decided:
            why_not = _why_not(self, device, dtype)
            why = why_not or f"{self.does}; checked against plain torch"
            _decided[key] = Status(self.name, not why_not, why)
        return _decided[key]


_decided: dict[tuple[str, str, torch.dtype], Status] = {}


def forget() -> None:
    """Forget all decisions; for tests that take capabilities away."""
    _decided.clear()


def _why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    if reference_only():
        return "FARTHING_KERNELS=reference"
    if missing := kernel.lacks(device, dtype):
        return missing
    # In a thread of its own, since modes belong to threads: whatever the caller does about gradients, counts or saves
    # of tensors neither changes the trial nor sees it.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try, kernel, device, dtype).result()


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Why the fast path cannot be trusted; "" if it can."""
    limit = TOLERANCE.get(dtype, TOLERANCE_HALF)
    try:
        for example in kernel.examples():
            inputs = on_device(example, device, dtype)
            exact = on_device(inputs, device, torch.float32)
            pairs = zip(outcomes(kernel.fast, inputs), outcomes(kernel.reference, exact), strict=True)
            error = max(distance(got, expected) for got, expected in pairs)
            if not error <= limit:  # also where it is no number
                return f"its result is off by {error:.1%}"
    except Exception as error:  # whatever it is, the reference will do
        first_line = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line[:120]}"
    return ""


def on_device(inputs: Sequence[Any], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs on a device, those of floating point in a dtype; other things as they are."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wanted = dtype if x.is_floating_point() else x.dtype
        return x.detach().to(device, wanted, copy=True).requires_grad_(x.requires_grad)

    return tuple(move(x) for x in inputs)


def outcomes(function: Callable[..., Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """A function's result, then the gradients of the inputs that require one (the result weighted at random)."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        out = function(*inputs)
        if not leaves:
            return [out]
        weights = numbers(*out.shape, seed=9).to(out)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers every time, float32, without touching torch's generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the expected norm."""
    exact = expected.detach().float()
    return float((got.detach().float() - exact).norm() / exact.norm().clamp_min(1e-12))


def anywhere(device: torch.device, dtype: torch.dtype) -> str:
    """Requirement of a kernel made of ordinary operations: none."""
    return ""


def cpu_bfloat16(device: torch.device, dtype: torch.dtype) -> str:
    """Requirement of a kernel that pays off only for bfloat16 on a CPU."""
    return "" if device.type == "cpu" and dtype == torch.bfloat16 else "for bfloat16 on a CPU"
