"""The two building blocks every layer is made of: a linear map and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` with two additions.

    * Outside autograd, on a CPU in bfloat16, the weight is laid out once for oneDNN and reused. The layout is keyed by
      the parameter's version counter, which every in-place update advances, so a sampler that runs between two
      optimizer steps can never read old weights.
    * `parts` tells how many output rows belong to each of the matrices fused into this one (q, k, v; gate, up), for
      adapters that store them apart and for optimizers that treat a matrix as a whole (Muon).
    """

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = parts
        self.lora: Lora | None = None
        self._packed: Tensor | None = None
        self._packed_version = -1

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.weight.dtype != torch.bfloat16 or self.weight.device.type != "cpu":
            y = F.linear(x, self.weight, self.bias)
        else:
            if self._packed is None or self._packed_version != self.weight._version:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
                self._packed_version = self.weight._version
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y if self.lora is None else y + self.lora(x)


class Lora(nn.Module):
    """A low-rank update, scale * B A (Hu et al., arXiv:2106.09685). B starts at zero: the model starts unchanged."""

    def __init__(self, linear: Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        factory = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        bound = linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(**factory))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **factory))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale

    def delta(self) -> Tensor:
        """The update as one matrix, [out, in] float32."""
        return (self.up.float() @ self.down.float()) * self.scale


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row; the backward is written out, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return wide.mul_(rstd).to(x.dtype).mul_(weight) if x.dtype != torch.float32 else wide * rstd * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        wide = grad.float()
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight
        inner = (wide * normed).mean(-1, keepdim=True)
        grad_x = normed.mul_(-inner).add_(wide).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv:1910.07467), the mean taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
