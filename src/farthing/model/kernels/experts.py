"""All routed experts of a mixture in a few batched products, with its own backward pass.

Shapes: N tokens, C model width, E experts, K experts per token, F inner width of an expert, S rows (`kernels.rows`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, anywhere, numbers
from farthing.model.kernels.rows import Rows, ragged_works


def mixture(
    x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor, gate_up_E2FC: Tensor, down_ECF: Tensor
) -> Tensor:
    """Return each token's sum over its experts of gate * SwiGLU expert, [N, C]; no token is dropped."""
    few = not torch.is_grad_enabled() and chosen_NK.numel() < len(down_ECF)  # fewer rows than experts
    function = expert_by_expert if few or not KERNEL.on(x_NC) else batched
    return function(x_NC, gates_NK, chosen_NK, gate_up_E2FC, down_ECF)


def expert_by_expert(
    x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor, gate_up_E2FC: Tensor, down_ECF: Tensor
) -> Tensor:
    """The definition; reads only the weights of the chosen experts."""
    out_NC = torch.zeros_like(x_NC)
    for expert in chosen_NK.unique().tolist():
        token, place = (chosen_NK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_NC[token], gate_up_E2FC[expert]).chunk(2, -1)
        inner = F.silu(gate) * up * gates_NK[token, place, None]
        out_NC = out_NC.index_add(0, token, F.linear(inner, down_ECF[expert]))
    return out_NC


def batched(
    x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor, gate_up_E2FC: Tensor, down_ECF: Tensor
) -> Tensor:
    rows = Rows.of(chosen_NK, len(down_ECF), ragged_works(x_NC, down_ECF.shape[-1]))
    return _Mixture.apply(x_NC, gates_NK, gate_up_E2FC, down_ECF, rows)


class _Mixture(torch.autograd.Function):
    """The experts' forward and backward passes as one function.

    Saves only the inputs and the inner products, and combines rows with a fused gather-and-sum. Padding rows have gate
    0, so they contribute nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, rows: Rows
    ) -> Tensor:
        x_SC = x_NC.index_select(0, rows.source_S)
        gate_S = gates_NK.new_zeros(len(rows.source_S))
        gate_S[rows.row_NK.flatten()] = gates_NK.flatten()
        inner_S2F = rows.product(x_SC, gate_up)
        gate, up = inner_S2F.chunk(2, -1)
        act_SF = F.silu(gate).mul_(up).mul_(gate_S[:, None])
        y_SC = rows.product(act_SF, down)
        ctx.save_for_backward(x_NC, gate_up, down, inner_S2F, gate_S)
        ctx.rows = rows
        return F.embedding_bag(rows.row_NK, y_SC, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_NC, gate_up, down, inner_S2F, gate_S = ctx.saved_tensors
        rows: Rows = ctx.rows
        experts = len(gate_up)
        x_SC = x_NC.index_select(0, rows.source_S)
        grad_SC = grad_NC.index_select(0, rows.source_S)
        gate, up = inner_S2F.chunk(2, -1)
        silu = F.silu(gate)
        act_SF = silu * up
        grad_act = rows.product(grad_SC, down, transposed=True)
        grad_gates = (grad_act * act_SF).sum(-1)[rows.row_NK]
        grad_act.mul_(gate_S[:, None])
        grad_down = rows.outer(grad_SC, act_SF.mul_(gate_S[:, None]), experts)
        grad_inner = torch.empty_like(inner_S2F)
        half_gate, half_up = grad_inner.chunk(2, -1)
        torch.mul(grad_act, silu, out=half_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=half_gate)
        grad_gate_up = rows.outer(grad_inner, x_SC, experts)
        grad_x = F.embedding_bag(rows.row_NK, rows.product(grad_inner, gate_up, transposed=True), mode="sum")
        return grad_x, grad_gates, grad_gate_up, grad_down, None


def _examples() -> list[tuple[Tensor, ...]]:
    """Even loads, which are padded, and 100 tokens that all choose the first expert, which are not."""
    weights = (numbers(8, 32, 16, seed=1).requires_grad_(), numbers(8, 16, 16, seed=2).requires_grad_())

    def inputs(chosen_NK: Tensor) -> tuple[Tensor, ...]:
        n, k = chosen_NK.shape
        return numbers(n, 16).requires_grad_(), numbers(n, k, seed=3).requires_grad_(), chosen_NK, *weights

    even_NK = (torch.arange(12)[:, None] + torch.tensor([0, 3])) % 8
    return [inputs(even_NK), inputs(torch.zeros(100, 1, dtype=torch.int64))]


KERNEL = Kernel(
    "experts", "batched products over all experts", batched, expert_by_expert, anywhere, _examples
)
