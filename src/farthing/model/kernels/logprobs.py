"""Log-probabilities of given tokens from hidden states and head, in pieces that stay in a processor's cache.

The forward pass writes d logp / d logits, so that backward is two products. While all of them are few they are kept for
it; otherwise backward computes them again. They lie in memory that the next step uses again: fresh pages cost as much
time as the product that fills them.

Shapes: M tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels import linear
from farthing.model.kernels.probe import Kernel, cpu_floats, numbers

PRODUCT_BYTES = 24 << 20  # of logits that one product makes: what a last-level cache may hold
PIECE = 1 << 19  # logits whose softmax is taken at a time, in float32: 2 MB

_free: list[Tensor] = []  # flat, used by no pass


def logprobs(
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    kept_bytes: int = 1 << 28,
) -> Tensor:
    """log p(target) under softmax(softcap(hidden @ head.T) / temperature), [M] float32.

    Args:
        kept_bytes: most bytes of logits that are kept for the backward pass, or computed at a time in it.
    """
    settings = (temperature, softcap, kept_bytes)
    out_M: Tensor = _Logprobs.apply(hidden_MC, head_VC, targets_M, settings)
    return out_M


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MC: Tensor,
        head_VC: Tensor,
        targets_M: Tensor,
        settings: tuple[float, float | None, int],
    ) -> Tensor:
        temperature, softcap, kept_bytes = settings
        ctx.save_for_backward(hidden_MC, head_VC, targets_M)
        ctx.settings, ctx.memory = settings, None
        out_M = hidden_MC.new_empty(len(targets_M), dtype=torch.float32)
        few = len(targets_M) * len(head_VC) * head_VC.element_size() <= kept_bytes
        if few and any(ctx.needs_input_grad):
            ctx.memory = _take(len(targets_M), head_VC)
        slopes_MV = None if ctx.memory is None else _rows(ctx.memory, len(targets_M), head_VC)
        _fill(out_M, slopes_MV, hidden_MC, head_VC, targets_M, temperature, softcap)
        return out_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MC, head_VC, targets_M = ctx.saved_tensors
        temperature, softcap, kept_bytes = ctx.settings
        grad_M1 = (grad_M / temperature)[:, None]
        memory, ctx.memory = ctx.memory, None  # a second backward pass computes them again
        if memory is not None:
            slopes_MV = _rows(memory, len(targets_M), head_VC)
            products = _products(ctx, slopes_MV, grad_M1, hidden_MC, head_VC)
            _free.append(memory)
            return *products, None, None
        rows = max(1, kept_bytes // (4 * len(head_VC)))
        memory = _take(min(rows, len(targets_M)), head_VC)
        grad_hidden, grad_head = torch.empty_like(hidden_MC), None
        for start in range(0, len(targets_M), rows):
            part = slice(start, start + rows)
            mine = _rows(memory, len(targets_M[part]), head_VC)
            _fill(None, mine, hidden_MC[part], head_VC, targets_M[part], temperature, softcap)
            own, product = _products(ctx, mine, grad_M1[part], hidden_MC[part], head_VC)
            if own is not None:
                grad_hidden[part] = own
            if product is not None:
                grad_head = product if grad_head is None else product.float().add_(grad_head)
        _free.append(memory)
        return grad_hidden, None if grad_head is None else grad_head.to(head_VC.dtype), None, None


def _take(rows: int, head_VC: Tensor) -> Tensor:
    """Memory for the logits of so many rows, flat; whoever takes it appends it to `_free` afterwards."""
    for number, memory in enumerate(_free):
        if memory.dtype == head_VC.dtype and memory.numel() >= rows * len(head_VC):
            return _free.pop(number)
    _free.clear()  # too small for this step, and so for others
    return torch.empty(rows * len(head_VC), dtype=head_VC.dtype)


def _rows(memory: Tensor, rows: int, head_VC: Tensor) -> Tensor:
    return memory[: rows * len(head_VC)].view(rows, -1)


def _fill(
    out_M: Tensor | None,
    slopes_MV: Tensor | None,
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """Write the log-probabilities to `out`, and onehot(target) - softmax, times the softcap's slope, to `slopes`."""
    vocab = len(head_VC)
    many = PRODUCT_BYTES // (vocab * head_VC.element_size()) // 64 * 64
    rows = min(max(many, 64), 512)
    few = max(1, PIECE // vocab)
    single = head_VC.dtype == torch.float32 and linear.KERNEL.on(head_VC)
    for start in range(0, len(targets_M), rows):
        hidden = hidden_MC[start : start + rows]
        logits = linear.product(hidden, head_VC) if single else hidden @ head_VC.T
        for first in range(0, len(hidden), few):
            part = slice(start + first, start + min(first + few, len(hidden)))
            x = logits[first : first + few].float()
            if softcap is not None:
                x = (x / softcap).tanh_().mul_(softcap)
            scores = x if temperature == 1.0 else x / temperature
            chosen = targets_M[part, None]
            shares = scores.softmax(-1)
            if out_M is not None:  # log of the sum = the largest score - the log of its share
                sums = scores.amax(-1) - shares.amax(-1).log()
                torch.sub(scores.gather(1, chosen)[:, 0], sums, out=out_M[part])
            if slopes_MV is not None:
                shares.scatter_add_(1, chosen, shares.new_full(chosen.shape, -1.0))
                if softcap is not None:  # tanh' = 1 - tanh^2
                    shares.mul_(1 - (x / softcap).square_())
                torch.neg(shares, out=slopes_MV[part]) if single else slopes_MV[part].copy_(shares.neg_())


def _products(
    ctx: Any, slopes_MV: Tensor, grad_M1: Tensor, hidden_MC: Tensor, head_VC: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the hidden states and the head."""
    grad_hidden = grad_head = None
    if ctx.needs_input_grad[0]:
        single = head_VC.dtype == torch.float32 and linear.KERNEL.on(head_VC)
        product = linear.product(slopes_MV, head_VC.T) if single else slopes_MV @ head_VC
        grad_hidden = (product * grad_M1).to(hidden_MC.dtype)
    if ctx.needs_input_grad[1]:
        grad_head = slopes_MV.T @ (hidden_MC * grad_M1).to(hidden_MC.dtype)
    return grad_hidden, grad_head


def _reference(
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    kept_bytes: int = 0,
) -> Tensor:
    logits = (hidden_MC @ head_VC.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits / temperature, targets_M, reduction="none")


def _examples() -> list[tuple[Any, ...]]:
    inputs = (
        numbers(5, 16).requires_grad_(),
        numbers(37, 16, seed=1).requires_grad_(),
        torch.tensor([0, 36, 5, 7, 5]),
    )
    return [inputs, (*inputs, 0.7, 20.0, 300)]


KERNEL = Kernel(
    "log-probabilities",
    "logits and their gradients piece by piece",
    logprobs,
    _reference,
    cpu_floats,
    _examples,
)
