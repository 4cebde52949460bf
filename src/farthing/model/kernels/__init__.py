"""Fast paths for particular hardware: functions of tensors, each with a reference in plain torch.

Before its first use, a fast path is probed (`kernels.probe`): the probe checks its requirements, runs it on tiny input
and compares the result with the reference. If that fails, or under FARTHING_KERNELS=reference, the slower reference
runs instead.
"""

from __future__ import annotations

import torch

from farthing.model.kernels import (
    adamw,
    attention,
    cross_entropy,
    experts,
    linear,
    logprobs,
    norm,
    packed,
    rows,
    segments,
    swiglu,
    window,
)
from farthing.model.kernels.native import trial
from farthing.model.kernels.probe import Kernel, Status, forget

__all__ = ["KERNELS", "Kernel", "Status", "forget", "status"]

KERNELS: tuple[Kernel, ...] = (
    packed.KERNEL,
    linear.KERNEL,
    norm.KERNEL,
    swiglu.KERNEL,
    attention.TORCH,
    attention.SHORT,
    segments.KERNEL,
    window.KERNEL,
    experts.KERNEL,
    rows.RAGGED,
    logprobs.KERNEL,
    cross_entropy.KERNEL,
    adamw.KERNEL,
    adamw.COMPILED,
    trial.KERNEL,
)


def status(device: str, dtype: torch.dtype) -> list[Status]:
    """Return whether each fast path is used on a device (`cpu`, `cuda:0`) in a dtype, and why."""
    return [kernel.status(torch.device(device), dtype) for kernel in KERNELS]
