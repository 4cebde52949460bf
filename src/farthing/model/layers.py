"""The two building blocks every layer is made of: a linear map and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` with three additions.

    * Outside autograd, on a CPU in bfloat16, the weight is laid out once for oneDNN and reused, and what follows the
      product is done with it. The layout is keyed by the parameter's place and version counter, which every in-place
      update advances (one through `.data` does not), so a sampler between two optimizer steps reads the new weights.
    * `parts` tells how many output rows belong to each of the matrices fused into this one (q, k, v; gate, up), for
      adapters that store them apart and for optimizers that treat a matrix as a whole (Muon).
    * `lora` holds a low-rank update, if one is being trained.
    """

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = parts
        self.lora: Lora | None = None
        self._packed: tuple[Tensor, ...] = ()
        self._packed_key = (0, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the packed layout out: it is opaque, and made again when needed."""
        return {**self.__dict__, "_packed": (), "_packed_key": (0, 0)}

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x W^T + b, and `plus` if it is given (the residual stream)."""
        if self._in_place():
            (packed,) = self._pack((self.out_features,))
            if plus is None:
                return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, packed, self.bias, "add")
        y = F.linear(x, self.weight, self.bias)
        if self.lora is not None:
            y = y + self.lora(x)
        return y if plus is None else plus + y

    def merged(self) -> Tensor:
        """The weight with its low-rank update, if there is one, [out, in]."""
        return self.weight if self.lora is None else self.weight + self.lora.delta().to(self.weight.dtype)

    def silu_product(self, x: Tensor) -> Tensor:
        """silu of the first part's output times the second's: SwiGLU's inner product, without gradients."""
        if self._in_place() and self.bias is None:
            gate, up = self._pack(self.parts)
            inner = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(x, inner, up, None, "mul")
        first, second = self(x).chunk(2, -1)
        return F.silu(first).mul_(second)

    def _in_place(self) -> bool:
        weight = self.weight
        plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and self.lora is None
        return plain and not torch.is_grad_enabled()

    def _pack(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        key = (self.weight.data_ptr(), self.weight._version)
        if self._packed_key != key or len(self._packed) != len(rows):
            pieces = self.weight.detach().split(rows)
            self._packed = tuple(
                torch.ops.mkldnn._reorder_linear_weight(piece.contiguous()) for piece in pieces
            )
            self._packed_key = key
        return self._packed


class Lora(nn.Module):
    """A low-rank update, scale * B A (Hu et al., arXiv:2106.09685). B starts at zero: the model starts unchanged."""

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
        """The update as one matrix, [out, in] float32."""
        return (self.up.float() @ self.down.float()) * self.scale


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv:1910.07467), the mean taken in float32.

    On a CPU in bfloat16 x / rms(x) is computed as the LayerNorm of [x, -x], whose mean is zero and whose variance is
    the mean square: torch has a fused kernel for it, forward and backward, and a dozen passes over memory for RMSNorm.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.rms_norm(x, (width,), self.weight, self.eps)
        both = F.layer_norm(torch.cat([x, -x], -1), (2 * width,), None, None, self.eps)
        return both[..., :width] * self.weight
