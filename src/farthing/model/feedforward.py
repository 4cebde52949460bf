"""The feed-forward half of a layer.

Shapes: N tokens, C model width, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.layers import Linear


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up for the two halves of one tensor; keeps that tensor alone and writes both gradients into one."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, (inner, inner), bias=bias)
        self.down = Linear(inner, (hidden,), bias=bias)

    def forward(self, x_NC: Tensor, plus: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.down(_SiluMul.apply(self.gate_up(x_NC)), plus)
        return self.down(self.gate_up.silu_product(x_NC), plus)
