"""Attention with bounded scores and sinks, a few queries at a time, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farthing.model.kernels import attention as module
from farthing.model.kernels.attention import Rule, attention, plain
from farthing.model.kernels.probe import numbers, result_and_gradients


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float | None, sinks: Tensor | None) -> Tensor:
    """One query and one key at a time, in words of the papers."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    shared = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores = (
            torch.stack([q[b, h, i] @ k[b, h // shared, j] for j in range(k.shape[2])]) * q.shape[-1] ** -0.5
        )
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        powers = scores.exp() * seen[i]
        nothing = 0.0 if sinks is None else sinks[h].exp()
        out[b, h, i] = (powers / (powers.sum() + nothing)) @ v[b, h // shared]
    return out


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("cap", "sunk"), [(1.5, False), (None, True), (1.5, True)])
def test_pieces_are_the_definition(
    at_once: int, causal: bool, cap: float | None, sunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * 2 * 4 * 7 * at_once)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    if not causal:
        seen[5:, 1:3] = False

    def inputs() -> list[Any]:
        qkv = [numbers(2, 4, 7, 8), numbers(2, 2, 7, 8, seed=1), numbers(2, 2, 7, 6, seed=2)]
        return [*(t.requires_grad_() for t in qkv), numbers(4, seed=3).requires_grad_() if sunk else None]

    def fast(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        rule = Rule(softcap=cap, sinks=None if sinks is None else sinks[:, None, None])
        return attention(q, k, v, None if causal else seen, causal, rule)

    def definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return by_hand(q, k, v, seen, cap, sinks)

    results = zip(
        result_and_gradients(fast, inputs()), result_and_gradients(definition, inputs()), strict=True
    )
    for got, wanted in results:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_bound_far_above_the_scores_changes_nothing() -> None:
    q, k, v = numbers(1, 2, 5, 8), numbers(1, 1, 5, 8, seed=1), numbers(1, 1, 5, 8, seed=2)
    expected = plain(q, k, v, None, True)
    torch.testing.assert_close(attention(q, k, v, None, True, Rule(softcap=1e4)), expected, atol=1e-5, rtol=0)
    lonely = Rule(sinks=torch.full((2, 1, 1), -50.0))
    torch.testing.assert_close(attention(q, k, v, None, True, lonely), expected, atol=1e-5, rtol=0)
