"""AdamW's step as one pass over weights, gradients and moments: torch's fused optimizer, or on a CPU a compiled one
that clips and publishes in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farthing.model.kernels.native import library
from farthing.model.kernels.native.build import UPDATE
from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations
from farthing.model.kernels.native.session import Session
from farthing.model.kernels.native.sizes import BFLOAT16, CHUNK, FLOAT32, ROUNDED
from farthing.model.kernels.probe import Kernel, anywhere, numbers


def usable(weight: Tensor) -> bool:
    """Return whether `torch.optim.AdamW` can be fused for parameters like this one."""
    return KERNEL.on(weight)


class CompiledAdamW(torch.optim.AdamW):
    """AdamW whose step also multiplies gradients by `clip` and writes each weight, rounded, where it is used.

    Its state has torch's names and shapes, so either continues the other's run.

    Args:
        groups: of float32 parameters, contiguous.
        published: for each parameter the tensor that it is written to (bfloat16, or float32), and whether a float32 one
            gets bfloat16's values.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        published: dict[nn.Parameter, tuple[Tensor, bool]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self.published, self.clip = published, 1.0
        self._session = Session(UPDATE)
        self._operations = Operations()
        self._for: list[tuple[int, ...]] = []
        self._settings = np.zeros((len(published), 8))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; a later step clips only if `clip` is set again."""
        present = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for row, (parameter, group) in enumerate(present):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
            state["step"] += 1
            (beta1, beta2), steps = group["betas"], float(state["step"])
            corrections = (1 - beta1**steps, 1 - beta2**steps)
            self._settings[row] = (
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"], *corrections, self.clip
            )  # fmt: skip
        if present:
            self._session.run(self._prepared([parameter for parameter, _ in present]))
        for parameter, _ in present:
            torch.autograd.graph.increment_version((parameter, self.published[parameter][0]))
        self.clip = 1.0

    def _prepared(self, parameters: Sequence[nn.Parameter]) -> Operations:
        """The operations for these parameters, made again only if a tensor has moved."""
        rows: list[tuple[int, ...]] = []
        for parameter in parameters:
            state, (out, rounded) = self.state[parameter], self.published[parameter]
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
            how = BFLOAT16 if out.dtype == torch.bfloat16 else ROUNDED if rounded else FLOAT32
            rows.append((*(tensor.data_ptr() for tensor in (*tensors, out)), how, parameter.numel()))
        if self._for != rows:
            self._operations, self._for = Operations(), rows
            for number, (master, gradient, mean, square, target, how, count) in enumerate(rows):
                self._operations.add(
                    Code.ADAMW,
                    master=master,
                    gradient=gradient,
                    mean=mean,
                    square=square,
                    out=target,
                    published=how,
                    count=count,
                    settings=self._settings[number].ctypes.data,
                    items=-(-count // CHUNK),
                )
        return self._operations


class Norm:
    """The norm of many float32 tensors together, in one pass."""

    def __init__(self) -> None:
        self._session = Session(UPDATE)

    def __call__(self, tensors: Sequence[Tensor]) -> float:
        counts = [-(-tensor.numel() // CHUNK) for tensor in tensors]
        sums, operations, start = np.zeros(sum(counts)), Operations(), 0
        for tensor, count in zip(tensors, counts, strict=True):
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float32
            operations.add(
                Code.SQUARES,
                x=tensor.data_ptr(),
                count=tensor.numel(),
                sums=sums[start:].ctypes.data,
                items=count,
            )
            start += count
        if counts:
            self._session.run(operations)
        return float(np.sqrt(sums.sum()))


def _two_steps(fused: bool, weight: Tensor, grad: Tensor) -> Tensor:
    """Return the weight after two steps with the same gradient."""
    parameter = nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    for _ in range(2):
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def _two_compiled_steps(weight: Tensor, grad: Tensor) -> Tensor:
    """The same, clipped to half the gradient's norm, as published in the weight's dtype."""
    parameter, out = nn.Parameter(weight.detach().float().clone()), torch.zeros_like(weight)
    optimizer = CompiledAdamW(
        [{"params": [parameter]}], {parameter: (out, False)}, lr=0.1, betas=(0.9, 0.999), eps=1e-8
    )
    for _ in range(2):
        parameter.grad = grad.float().clone()
        optimizer.clip = 0.5 * float(grad.float().norm()) / Norm()([parameter.grad])
        optimizer.step()
    return out


def _two_clipped_steps(weight: Tensor, grad: Tensor) -> Tensor:
    return _two_steps(False, weight, grad * 0.5)


def _compiled_lacks(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return "for bfloat16 and float32 on a CPU"
    return library.lacks()


def _examples() -> list[tuple[Tensor, Tensor]]:
    return [(numbers(7, 5), numbers(7, 5, seed=1))]


KERNEL = Kernel(
    "AdamW", "torch's fused step", partial(_two_steps, True), partial(_two_steps, False), anywhere, _examples
)
COMPILED = Kernel(
    "clipping, AdamW and publishing",
    "one pass, compiled by numba",
    _two_compiled_steps,
    _two_clipped_steps,
    _compiled_lacks,
    _examples,
)
