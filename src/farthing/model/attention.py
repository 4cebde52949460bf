"""Grouped-query attention, and the ways a set of tokens can attend.

A layer projects and rotates; *what attends to what, and where keys are kept* is the business of the `Attend` it is
handed. Training hands it `Segments`, the engine its paged cache, and the network stays one.

Shapes: N tokens (of all sequences, flat), H query heads, G key/value heads, D head width, P prefix, S suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.config import ModelConfig
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import rotate

DENSE_LENGTH = (
    1024  # up to here a prompt with its samples is one product with a mask, which wastes less than it saves
)


class Attend(Protocol):
    """Attention proper for layer number `layer`: q [N, H, D], k and v [N, G, D] -> [N, H, D]."""

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, /) -> Tensor: ...


class Segments:
    """Causal attention within segments laid one after another; a segment is a prefix and any number of suffixes.

    Every suffix sees the prefix and itself, never its siblings. A packed document is a prefix without suffixes; the
    samples of a prompt are its suffixes, so a prompt is computed once for its whole group (exact, unlike padding).

    Args:
        segments: (prefix length, suffix lengths) in the order of the tokens.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.segments = [(prefix, list(suffixes)) for prefix, suffixes in segments]
        lengths = {prefix for prefix, _ in self.segments}
        plain = all(not suffixes for _, suffixes in self.segments)
        self.rectangle = (len(self.segments), lengths.pop()) if plain and len(lengths) == 1 else None
        self._masks: dict[int, Tensor] = {}

    @property
    def tokens(self) -> int:
        """How many tokens all segments hold together."""
        return sum(sum((prefix, *suffixes)) for prefix, suffixes in self.segments)

    def positions(self) -> Tensor:
        """The position of every token in its own sequence, [N] int64: suffixes go on where the prefix ends."""
        parts = []
        for prefix, suffixes in self.segments:
            parts.append(torch.arange(prefix))
            parts += [torch.arange(prefix, prefix + n) for n in suffixes]
        return torch.cat(parts)

    def pairs(self) -> int:
        """(query, key) pairs attended, for counting FLOPs."""
        return sum(
            prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in suffixes)
            for prefix, suffixes in self.segments
        )

    def _tree_mask(self, number: int, like: Tensor) -> Tensor:
        """Who sees whom within segment `number`: [n, n], 0 where allowed and -inf elsewhere."""
        if number not in self._masks:
            prefix, suffixes = self.segments[number]
            sizes = torch.tensor([prefix, *suffixes])
            part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            seen = ((part[None, :] == 0) | (part[None, :] == part[:, None])).tril()
            mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[number] = mask.to(like.device)
        return self._masks[number]

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        if self.rectangle:
            rows, length = self.rectangle
            q, k, v = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGD))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(q_NHD.shape)
        sizes = [sum((prefix, *suffixes)) for prefix, suffixes in self.segments]
        pieces = zip(*(t.transpose(0, 1).split(sizes, 1) for t in (q_NHD, k_NGD, v_NGD)), strict=True)
        outs = []
        for number, (q, k, v) in enumerate(pieces):
            prefix, suffixes = self.segments[number]
            if not suffixes:
                outs.append(_sdpa(q, k, v, None))
            elif q.shape[1] <= DENSE_LENGTH:
                outs.append(_sdpa(q, k, v, self._tree_mask(number, q)))
            else:
                outs += _branches(q, k, v, prefix, suffixes)
        return torch.cat(outs, 1).transpose(0, 1)


def _branches(q_HND: Tensor, k_GND: Tensor, v_GND: Tensor, prefix: int, suffixes: list[int]) -> list[Tensor]:
    """The prefix and each suffix by themselves: many small products, but no mask over the whole segment."""
    pieces = zip(*(t.split([prefix, *suffixes], 1) for t in (q_HND, k_GND, v_GND)), strict=True)
    q, k, v = next(pieces)
    outs = [_sdpa(q, k, v, None)]
    for q_s, k_s, v_s in pieces:
        new = q_s.shape[1]
        mask = torch.ones(new, prefix + new, dtype=torch.bool, device=q.device).tril(diagonal=prefix)
        outs.append(_sdpa(q_s, torch.cat([k, k_s], 1), torch.cat([v, v_s], 1), mask))
    return outs


def _sdpa(q_HLD: Tensor, k_GMD: Tensor, v_GMD: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence's attention; without a mask it is causal."""
    return F.scaled_dot_product_attention(
        q_HLD[None], k_GMD[None], v_GMD[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )[0]


class GroupedQueryAttention(nn.Module):
    """Attention with fewer key/value than query heads (Ainslie et al., arXiv:2305.13245); q, k, v in one matrix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o = Linear(rows[0], (config.hidden_size,), bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_eps) if config.qk_norm else None

    def forward(
        self, x_NC: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, plus: Tensor | None = None
    ) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qk, v = (
            self.qkv(x_NC)
            .view(-1, heads + 2 * kv_heads, self.head_dim)
            .split([heads + kv_heads, kv_heads], 1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([heads, kv_heads], 1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        q, k = rotate(qk, *rope).split([heads, kv_heads], 1)
        return self.o(attend(self.layer, q, k, v).reshape(x_NC.shape[0], -1), plus)
