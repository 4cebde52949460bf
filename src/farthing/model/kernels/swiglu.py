"""SwiGLU's inner product, silu(gate) * up, and GeGLU's, with a backward pass that saves one tensor and writes one.

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
    return _product(gate_up_N2F, False)


def gelu_product(gate_up_N2F: Tensor) -> Tensor:
    """Return gelu(first half) * second half, [N, F], with GELU's tanh approximation."""
    return _product(gate_up_N2F, True)


def _product(gate_up_N2F: Tensor, gelu: bool) -> Tensor:
    if torch.is_grad_enabled() and KERNEL.on(gate_up_N2F):
        return _Product.apply(gate_up_N2F, gelu)
    return _reference(gate_up_N2F, gelu)


def _reference(gate_up_N2F: Tensor, gelu: bool = False) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, -1)
    return _activated(gate, gelu) * up


def _activated(gate_NF: Tensor, gelu: bool) -> Tensor:
    return F.gelu(gate_NF, approximate="tanh") if gelu else F.silu(gate_NF)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        ctx.gelu = gelu
        gate, up = gate_up_N2F.chunk(2, -1)
        return _activated(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        (gate_up_N2F,) = ctx.saved_tensors
        gate, up = gate_up_N2F.chunk(2, -1)
        out = torch.empty_like(gate_up_N2F)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad_NF, _activated(gate, ctx.gelu), out=grad_up)
        above = grad_NF * up
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(above, gate, approximate="tanh", grad_input=grad_gate)
        else:
            torch.ops.aten.silu_backward.grad_input(above, gate, grad_input=grad_gate)
        return out, None


def _fast(gate_up_N2F: Tensor, gelu: bool = False) -> Tensor:
    return _Product.apply(gate_up_N2F, gelu)


def _examples() -> list[tuple[Tensor, bool]]:
    return [(numbers(3, 20).requires_grad_(), gelu) for gelu in (False, True)]


KERNEL = Kernel("SwiGLU", "one kept tensor, one gradient", _fast, _reference, anywhere, _examples)
