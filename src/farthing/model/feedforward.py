"""The feed-forward half of a layer.

Shapes: N tokens, C model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from farthing.model.kernels import swiglu
from farthing.model.layers import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); gate and up are fused into one matrix."""

    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, (inner, inner), bias=bias)
        self.down = Linear(inner, (hidden,), bias=bias)

    def forward(self, x_NC: Tensor, plus: Tensor | None = None) -> Tensor:
        return self.down(self.gate_up.silu_product(x_NC), plus)


class GeGLU(SwiGLU):
    """The same with GELU, by its tanh approximation, in SiLU's place."""

    def forward(self, x_NC: Tensor, plus: Tensor | None = None) -> Tensor:
        return self.down(swiglu.gelu_product(self.gate_up(x_NC)), plus)
