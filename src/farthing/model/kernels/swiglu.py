"""SwiGLU's inner product, silu(gate) * up, with a backward pass that saves one tensor and writes one.

Shapes: N tokens, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, anywhere, numbers


def silu_product(gate_up_N2F: Tensor) -> Tensor:
    """Return silu(first half) * second half, [N, F]."""
    if torch.is_grad_enabled() and KERNEL.on(gate_up_N2F):
        return _SiluProduct.apply(gate_up_N2F)
    return _reference(gate_up_N2F)


def _reference(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, -1)
    return F.silu(gate) * up


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        gate, up = gate_up_N2F.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors
        gate, up = gate_up_N2F.chunk(2, -1)
        out = torch.empty_like(gate_up_N2F)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad_NF, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_NF * up, gate, grad_input=grad_gate)
        return out


def _examples() -> list[tuple[Tensor]]:
    return [(numbers(3, 20).requires_grad_(),)]


KERNEL = Kernel(
    "SwiGLU", "one kept tensor, one gradient", _SiluProduct.apply, _reference, anywhere, _examples
)
