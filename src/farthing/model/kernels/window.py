"""Attention within a sliding window: a token sees itself and the window - 1 tokens before it (arXiv:2310.06825
section 2).

Queries are the last L of M positions. Shapes: B sequences, H query heads, G key/value heads, L queries, M keys, D head
width, E value width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from farthing.base.sizes import SHORT_LENGTH
from farthing.model.kernels.attention import FULL, Rule, attention, seen_causally
from farthing.model.kernels.probe import Kernel, anywhere, numbers

LEAST, MOST = (
    128,
    SHORT_LENGTH,
)  # queries of a block: longer ones compute more pairs in vain, shorter ones are slow


def causal(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, rule: Rule = FULL) -> Tensor:
    """Return causal attention of the last L of M positions, each within the rule's window, [B, H, L, E]."""
    if rule.window is None or k_BGMD.shape[2] <= rule.window:
        return attention(q_BHLD, k_BGMD, v_BGME, None, True, rule)
    function = blocks if KERNEL.on(q_BHLD) else masked
    return function(q_BHLD, k_BGMD, v_BGME, rule)


def masked(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, rule: Rule) -> Tensor:
    """The definition: every query and every key, under a mask."""
    length, keys = q_BHLD.shape[2], k_BGMD.shape[2]
    assert rule.window is not None
    return attention(q_BHLD, k_BGMD, v_BGME, _band(length, keys, rule.window, q_BHLD.device), False, rule)


def blocks(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, rule: Rule) -> Tensor:
    """Blocks of queries, each with the keys that any of them sees."""
    length, keys, window = q_BHLD.shape[2], k_BGMD.shape[2], rule.window
    assert window is not None
    outs: list[Tensor] = []
    for queries in q_BHLD.split(min(max(window, LEAST), MOST), 2):
        end = keys - length + sum(out.shape[2] for out in outs) + queries.shape[2]
        first = max(0, end - queries.shape[2] - window + 1)
        mask = _bias(queries.shape[2], end - first, window, queries.dtype, queries.device)
        outs.append(attention(queries, k_BGMD[:, :, first:end], v_BGME[:, :, first:end], mask, False, rule))
    return torch.cat(outs, 2)


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see, [queries, keys] bool."""
    seen = seen_causally(queries, keys, device)
    return seen & torch.ones_like(seen).triu(keys - queries - window + 1)


@lru_cache(maxsize=8)
def _bias(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same as a bias of the scores: 0 where a key is seen, -inf elsewhere. Nearly all blocks of all layers share
    one, which autograd therefore keeps once."""
    with torch.inference_mode(False):
        bias = torch.zeros(queries, keys, dtype=dtype, device=device)
        return bias.masked_fill_(~_band(queries, keys, window, device), -torch.inf)


def _examples() -> list[tuple[Any, ...]]:
    def inputs(length: int, keys: int, window: int) -> tuple[Any, ...]:
        q, k = numbers(2, 4, length, 16).requires_grad_(), numbers(2, 2, keys, 16, seed=1).requires_grad_()
        return q, k, numbers(2, 2, keys, 16, seed=2).requires_grad_(), Rule(window)

    return [inputs(150, 150, 5), inputs(140, 152, 6)]


KERNEL = Kernel("windows", "blocks of queries with the keys they see", blocks, masked, anywhere, _examples)
