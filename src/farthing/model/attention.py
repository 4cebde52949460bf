"""Grouped-query attention, and the `Attend` interface that decides which tokens attend to which.

A layer projects and rotates; the `Attend` passed to it decides what attends to what and where keys are kept. Training
passes `Segments` and the engine passes its paged cache, so both share one network. Latent attention (`model.latent`)
passes what it would cache and lets the `Attend` choose between its two forms.

Shapes: N tokens (of all sequences, flat), H query heads, G key/value heads, D head width, E value width (D, or less in
latent attention), L queries and M keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from farthing.model.config import ModelConfig
from farthing.model.kernels.attention import attention
from farthing.model.kernels.segments import Plan
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import rotate

if TYPE_CHECKING:
    from farthing.model.latent import LatentAttention


class Attend(Protocol):
    """Attention of layer number `layer`: q [N, H, D], k [N, G, D], v [N, G, E] -> [N, H, E].

    `latent` does the same for a `LatentAttention`, from its queries, latents and shared rotated keys.
    """

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, /) -> Tensor: ...

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor, /) -> Tensor: ...


class Segments:
    """Causal attention within concatenated segments; a segment is a prefix and any number of suffixes.

    Each suffix sees the prefix and itself, never its siblings. A packed document is a prefix without suffixes. The
    samples of a prompt are its suffixes, so a prompt is computed once for its whole group (exact, unlike padding).

    Args:
        segments: (prefix length, suffix lengths) in token order.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.segments = [(prefix, list(suffixes)) for prefix, suffixes in segments]
        self._plan = Plan(self.segments)

    @property
    def tokens(self) -> int:
        """Number of tokens in all segments."""
        return sum(sum((prefix, *suffixes)) for prefix, suffixes in self.segments)

    def positions(self) -> Tensor:
        """Position of each token in its own sequence, [N] int64; suffixes continue where the prefix ends."""
        parts = []
        for prefix, suffixes in self.segments:
            parts.append(torch.arange(prefix))
            parts += [torch.arange(prefix, prefix + n) for n in suffixes]
        return torch.cat(parts)

    def pairs(self) -> int:
        """Number of (query, key) pairs attended, for counting FLOPs."""
        return sum(
            prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in suffixes)
            for prefix, suffixes in self.segments
        )

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Expanded form: each head has its own keys and values, as in ordinary attention."""
        return self(attention.layer, q_NHD, *attention.expand(c_NL, r_NR))

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor) -> Tensor:
        return self._plan(q_NHD, k_NGD, v_NGE)


def sequence_attention(q_HLD: Tensor, k_GMD: Tensor, v_GME: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one sequence, [H, L, E]; causal if there is no mask."""
    return attention(q_HLD[None], k_GMD[None], v_GME[None], mask, causal=mask is None)[0]


class GroupedQueryAttention(nn.Module):
    """Attention with fewer key/value heads than query heads (Ainslie et al., arXiv:2305.13245).

    q, k and v are fused into one matrix.
    """

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
