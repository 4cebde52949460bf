"""AdamW's step as one pass over weights, gradients and moments (torch's fused optimizer), on devices that have it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from farthing.model.kernels.probe import Kernel, anywhere, numbers


def usable(weight: Tensor) -> bool:
    """Return whether `torch.optim.AdamW` can be fused for parameters like this one."""
    return KERNEL.on(weight)


def _two_steps(fused: bool, weight: Tensor, grad: Tensor) -> Tensor:
    """Return the weight after two steps with the same gradient."""
    parameter = nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    for _ in range(2):
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def _examples() -> list[tuple[Tensor, Tensor]]:
    return [(numbers(7, 5), numbers(7, 5, seed=1))]


KERNEL = Kernel(
    "AdamW", "torch's fused step", partial(_two_steps, True), partial(_two_steps, False), anywhere, _examples
)
