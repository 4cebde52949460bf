"""AdamW's step as one pass over weights, gradients and moments: torch's fused optimizer, or on a CPU a compiled one
that clips and publishes in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farthing.model.kernels.native import trial
from farthing.model.kernels.native.build import UPDATE
from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations, Repeated
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
        self.norm = Norm()
        self._session, self._operations = Session(UPDATE), Repeated(Code.ADAMW)
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
        rows = []
        for parameter, settings in zip(parameters, self._settings, strict=False):
            state, (out, rounded) = self.state[parameter], self.published[parameter]
            assert parameter.grad is not None
            tensors = {
                "master": parameter,
                "gradient": parameter.grad,
                "mean": state["exp_avg"],
                "square": state["exp_avg_sq"],
            }
            how = BFLOAT16 if out.dtype == torch.bfloat16 else ROUNDED if rounded else FLOAT32
            rows.append(
                {
                    **{name: _address(tensor) for name, tensor in tensors.items()},
                    "out": out.data_ptr(),
                    "published": how,
                    "count": parameter.numel(),
                    "settings": settings.ctypes.data,
                    "items": -(-parameter.numel() // CHUNK),
                }
            )
        return self._operations.of(rows)


class Norm:
    """The norm of many float32 tensors together, in one pass."""

    def __init__(self) -> None:
        self._session, self._operations = Session(UPDATE), Repeated(Code.SQUARES)
        self._sums = np.zeros(0)

    def __call__(self, tensors: Sequence[Tensor]) -> float:
        """The norm of contiguous tensors."""
        counts = [-(-tensor.numel() // CHUNK) for tensor in tensors]
        if len(self._sums) != sum(counts):
            self._sums = np.zeros(sum(counts))
        starts = np.cumsum([0, *counts])[:-1]
        rows = [
            {
                "x": _address(tensor),
                "count": tensor.numel(),
                "sums": self._sums.ctypes.data + 8 * int(start),
                "items": count,
            }
            for tensor, start, count in zip(tensors, starts, counts, strict=True)
        ]
        if rows:
            self._session.run(self._operations.of(rows))
        return float(np.sqrt(self._sums.sum()))


def _address(tensor: Tensor) -> int:
    """Of a tensor that compiled code reads as one row of float32."""
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return tensor.data_ptr()


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
    trial.lacks,
    _examples,
)
