"""The building blocks of every layer: a linear map and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.kernels import linear, norm, packed, swiglu


class Linear(nn.Linear):
    """`nn.Linear` with three additions.

    * Outside autograd the weight may be packed once for the processor and reused (`kernels.packed`), unless `packs` is
      false: a large network has no memory for it.
    * `parts` holds the number of output rows of each matrix fused into this one (q, k, v; gate, up), for adapters that
      store them separately and for optimizers that treat a matrix as a whole (Muon).
    * `lora` holds a low-rank update while one is being trained.
    """

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = parts
        self.lora: Lora | None = None
        self.packs = True
        self._layout = packed.Layout()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed layout out of copies: it is opaque and rebuilt on demand."""
        return {**self.__dict__, "_layout": packed.Layout()}

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return x W^T + b, plus `plus` if given (the residual stream)."""
        if self.packs and self.lora is None and packed.usable(self.weight):
            (layout,) = self._layout.of(self.weight, (self.out_features,))
            return packed.linear(x, layout, self.bias, plus)
        y = linear.linear(x, self.weight, self.bias, plus)
        return y if self.lora is None else y + self.lora(x)

    def silu_product(self, x: Tensor) -> Tensor:
        """Return silu(first part's output) * (second part's output), SwiGLU's inner product."""
        if self.packs and self.lora is None and self.bias is None and packed.usable(self.weight):
            return packed.silu_product(x, *self._layout.of(self.weight, self.parts))
        return swiglu.silu_product(self(x))

    def merged(self) -> Tensor:
        """Return the weight with its low-rank update, if any, [out, in]."""
        return self.weight if self.lora is None else self.weight + self.lora.delta().to(self.weight.dtype)


class Lora(nn.Module):
    """A low-rank update, scale * B A (Hu et al., arXiv:2106.09685). B starts at zero, so the model starts unchanged."""

    def __init__(self, linear: Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        weight = linear.weight
        bound = linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(linear.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale

    def delta(self) -> Tensor:
        """Return the update as one matrix, [out, in] float32."""
        return (self.up.float() @ self.down.float()) * self.scale


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv:1910.07467), with the mean in float32.

    A centred norm multiplies by 1 + weight, in float32: the sum has no room in bfloat16.
    """

    def __init__(self, width: int, eps: float, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if centred else torch.ones(width))
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return norm.rms_norm(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)
        return norm.rms_norm(x, self.weight, self.eps)
