"""Checks a fast path before use: are its requirements met, and does it agree with its reference?

The decision is cached for each device type and dtype. It does not depend on timing, so a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farthing.base.device import reference_only

# Largest distance of a result from its float32 reference, relative to the norm. Rounding gives a tenth of this,
# TF32 products a fifth; a wrong kernel exceeds it.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
TOLERANCE_HALF = 0.03


@dataclass(frozen=True)
class Status:
    """Whether a fast path is used, and a short reason."""

    name: str
    on: bool
    why: str


@dataclass(frozen=True)
class Kernel:
    """A fast path, its reference, and the inputs that test it.

    Attributes:
        name: name shown by `farthing doctor`.
        does: short description.
        fast, reference: the same function of tensors; the second is plain torch.
        lacks: returns why the fast path cannot run for a device type and dtype, without running it; "" if it may.
        examples: returns tiny inputs, float32 on the CPU; gradients are compared for inputs that require them.
    """

    name: str
    does: str
    fast: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    lacks: Callable[[torch.device, torch.dtype], str]
    examples: Callable[[], Sequence[tuple[Any, ...]]]

    def on(self, like: Tensor) -> bool:
        """Return whether to use the fast path for tensors like this one."""
        return self.status(like.device, like.dtype).on

    def status(self, device: torch.device, dtype: torch.dtype) -> Status:
        """Return the cached decision, probing on the first call."""
        key = (self.name, device.type, dtype)
        if key not in _decisions:
            why_not = _why_not(self, device, dtype)
            why = why_not or f"{self.does}; checked against plain torch"
            _decisions[key] = Status(self.name, not why_not, why)
        return _decisions[key]


_decisions: dict[tuple[str, str, torch.dtype], Status] = {}


def forget() -> None:
    """Drop all cached decisions; for tests that change what the machine offers."""
    _decisions.clear()


def _why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    if reference_only():
        return "FARTHING_KERNELS=reference"
    if missing := kernel.lacks(device, dtype):
        return missing
    # Run in a separate thread because torch's modes are per thread: the caller's gradient mode, counters and
    # saved-tensor hooks neither affect the trial nor see it.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try, kernel, device, dtype).result()


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the fast path cannot be trusted; "" if it can."""
    limit = TOLERANCE.get(dtype, TOLERANCE_HALF)
    try:
        for example in kernel.examples():
            inputs = cast(example, device, dtype)
            exact = cast(inputs, device, torch.float32)
            pairs = zip(
                result_and_gradients(kernel.fast, inputs),
                result_and_gradients(kernel.reference, exact),
                strict=True,
            )
            worst = max(distance(got, expected) for got, expected in pairs)
            if not worst <= limit:  # true for NaN as well
                return f"its result is off by {worst:.1%}"
    except Exception as error:  # any failure falls back to the reference
        first_line = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line[:120]}"
    return ""


def cast(inputs: Sequence[Any], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Copy the tensors among the inputs to a device, floating-point ones to a dtype; keep other inputs."""

    def cast_one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        target = dtype if x.is_floating_point() else x.dtype
        return x.detach().to(device, target, copy=True).requires_grad_(x.requires_grad)

    return tuple(cast_one(x) for x in inputs)


def result_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Return a function's result, then the gradients (of the result weighted at random) of inputs that require one."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        out = function(*inputs)
        if not leaves:
            return [out]
        weights = numbers(*out.shape, seed=9).to(out)
        return [
            out.detach(),
            *torch.autograd.grad((out * weights).sum(), leaves),
        ]  # given weights it loads sympy


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return the same normal float32 numbers for the same seed, without touching torch's global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the expected norm."""
    exact = expected.detach().float()
    return float((got.detach().float() - exact).norm() / exact.norm().clamp_min(1e-12))


def anywhere(device: torch.device, dtype: torch.dtype) -> str:
    """`Kernel.lacks` of a fast path made of ordinary operations: it runs anywhere."""
    return ""


def cpu_floats(device: torch.device, dtype: torch.dtype) -> str:
    """`Kernel.lacks` of a fast path for bfloat16 and float32 on a CPU."""
    known = device.type == "cpu" and dtype in (torch.bfloat16, torch.float32)
    return "" if known else "for bfloat16 and float32 on a CPU"


def cpu_bfloat16(device: torch.device, dtype: torch.dtype) -> str:
    """`Kernel.lacks` of a fast path that only helps bfloat16 on a CPU."""
    return "" if device.type == "cpu" and dtype == torch.bfloat16 else "for bfloat16 on a CPU"
