"""A linear map for training as three oneDNN products, the residual stream added by the first.

For float32 torch multiplies by MKL, which on processors that are not Intel's neither uses AVX-512 nor reaches AVX2's
limit: oneDNN is 1.15 times as fast with AVX2 and 2.3 times with AVX-512 (Zen 5). bfloat16 products are oneDNN's
anyway; there the function saves the pass that adds the stream.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.base import processor
from farthing.model.kernels.probe import Kernel, cpu_floats, numbers


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, plus_NO: Tensor | None) -> Tensor:
    """Return x W^T + b, plus `plus` if given, [N, O]."""
    if x_NI.dim() == 2 and torch.is_grad_enabled() and KERNEL.on(x_NI):
        return _fast(x_NI, weight_OI, bias_O, plus_NO)
    return _reference(x_NI, weight_OI, bias_O, plus_NO)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, plus_NO: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.biased, ctx.stream = bias_O is not None, plus_NO is not None
        return product(x_NI, weight_OI, bias_O, plus_NO)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        grad_x = grad_weight = None
        single = grad_NO.dtype == torch.float32
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_NO, weight_OI.T) if single else grad_NO @ weight_OI
        if ctx.needs_input_grad[1]:
            # oneDNN wants both transposed: with AVX2 that costs what its product saves
            turn = single and processor.isa() != "avx2"
            grad_weight = product(grad_NO.T.contiguous(), x_NI.T) if turn else grad_NO.T @ x_NI
        grad_bias = grad_NO.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, grad_NO if ctx.stream else None


def product(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, plus_NO: Tensor | None = None
) -> Tensor:
    """oneDNN's x W^T + b + plus."""
    if plus_NO is None:
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_NI, plus_NO, weight_OI, bias_O, "add")


def _fast(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, plus_NO: Tensor | None) -> Tensor:
    return _Linear.apply(x_NI, weight_OI, bias_O, plus_NO)


def _reference(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, plus_NO: Tensor | None) -> Tensor:
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    return y_NO if plus_NO is None else plus_NO + y_NO


def _lacks(device: torch.device, dtype: torch.dtype) -> str:
    if reason := cpu_floats(device, dtype):
        return reason
    if processor.isa() not in processor.X86[1:]:
        return "oneDNN is measured with AVX2 and later only"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no mkldnn._linear_pointwise"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if dtype == torch.bfloat16 and supported is not None and not supported():
        return "oneDNN has no bfloat16 on this processor"
    return ""


def _examples() -> list[tuple[Tensor | None, ...]]:
    def inputs(rows: int) -> tuple[Tensor, ...]:
        shapes = ((rows, 32), (48, 32), (48,), (rows, 48))
        return tuple(numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))

    return [inputs(1), inputs(20), (*inputs(20)[:2], None, None)]


KERNEL = Kernel("linear maps", "oneDNN products, forward and backward", _fast, _reference, _lacks, _examples)
