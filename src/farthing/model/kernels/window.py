"""Attention within a sliding window: a token sees itself and the window - 1 tokens before it (arXiv:2310.06825
section 2).

Queries are the last L of M positions. Shapes: B sequences, H query heads, G key/value heads, L queries, M keys, D head
width, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farthing.model.kernels.attention import FULL, Rule, attention
from farthing.model.kernels.probe import Kernel, anywhere, numbers


def causal(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, rule: Rule = FULL) -> Tensor:
    """Return causal attention of the last L of M positions, each within the rule's window, [B, H, L, E]."""
    length, keys = q_BHLD.shape[2], k_BGMD.shape[2]
    if rule.window is None or keys <= rule.window:
        mask = None if length == keys else seen(keys - length, keys, 0, keys, q_BHLD.device)
        return attention(q_BHLD, k_BGMD, v_BGME, mask, causal=mask is None)
    function = blocks if KERNEL.on(q_BHLD) else masked
    return function(q_BHLD, k_BGMD, v_BGME, rule.window)


def seen(
    start: int, end: int, first: int, last: int, device: torch.device, window: int | None = None
) -> Tensor:
    """Return which of the keys first..last-1 the queries start..end-1 see, [queries, keys] bool."""
    ahead = torch.arange(start, end, device=device)[:, None] - torch.arange(first, last, device=device)
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


def masked(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, window: int) -> Tensor:
    """The definition: every query and every key, under a mask."""
    length, keys = q_BHLD.shape[2], k_BGMD.shape[2]
    mask = seen(keys - length, keys, 0, keys, q_BHLD.device, window)
    return attention(q_BHLD, k_BGMD, v_BGME, mask)


def blocks(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, window: int) -> Tensor:
    """Blocks of a window's length of queries, each with the keys that any of them sees: two windows."""
    length, keys = q_BHLD.shape[2], k_BGMD.shape[2]
    outs = []
    for start in range(0, length, window):
        end = min(start + window, length)
        at, last = keys - length + start, keys - length + end
        first = max(0, at - window + 1)
        mask = seen(at, last, first, last, q_BHLD.device, window)
        k, v = k_BGMD[:, :, first:last], v_BGME[:, :, first:last]
        outs.append(attention(q_BHLD[:, :, start:end], k, v, mask))
    return torch.cat(outs, 2)


def _examples() -> list[tuple[Any, ...]]:
    def inputs(length: int, keys: int, window: int) -> tuple[Any, ...]:
        q, k = numbers(2, 4, length, 16).requires_grad_(), numbers(2, 2, keys, 16, seed=1).requires_grad_()
        return q, k, numbers(2, 2, keys, 16, seed=2).requires_grad_(), window

    return [inputs(19, 19, 5), inputs(7, 19, 6)]


KERNEL = Kernel("windows", "blocks of queries with the keys they see", blocks, masked, anywhere, _examples)
