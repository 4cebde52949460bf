"""Grouped-query attention, and the `Attend` interface that decides which tokens attend to which.

A layer projects and rotates; the `Attend` passed to it decides what attends to what and where keys are kept. Training
passes `Segments` and the engine passes its paged cache, so both share one network. Latent attention (`model.latent`)
passes what it would cache and lets the `Attend` choose between its two forms. A layer's `Rule` narrows what its tokens
see: with a sliding window (Mistral 7B, arXiv:2310.06825 section 2) only the last tokens.

Shapes: N tokens (of all sequences, flat), H query heads, G key/value heads, D head width, E value width (D, or less in
latent attention), L queries and M keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from farthing.model.config import ModelConfig
from farthing.model.kernels.attention import FULL, Rule
from farthing.model.kernels.segments import Plan
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import rotate

if TYPE_CHECKING:
    from farthing.model.latent import LatentAttention


EVERYTHING: Mapping[int | None, int] = {None: 1}  # the windows of a network whose layers all see everything


class Attend(Protocol):
    """Attention of layer number `layer` under its rule: q [N, H, D], k [N, G, D], v [N, G, E] -> [N, H, E].

    `latent` does the same for a `LatentAttention`, from its queries, latents and shared rotated keys.
    """

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, rule: Rule = FULL, /
    ) -> Tensor: ...

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

    def pairs(self, windows: Mapping[int | None, int] = EVERYTHING) -> float:
        """Number of (query, key) pairs attended in a layer, for counting FLOPs; see `mean_pairs`."""
        spans = [
            span
            for prefix, suffixes in self.segments
            for span in [(0, prefix), *((prefix, prefix + n) for n in suffixes)]
        ]
        return mean_pairs(spans, windows)

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Expanded form: each head has its own keys and values, as in ordinary attention."""
        return self(attention.layer, q_NHD, *attention.expand(c_NL, r_NR))

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, rule: Rule = FULL) -> Tensor:
        return self._plan(q_NHD, k_NGD, v_NGE, rule)


def mean_pairs(spans: Iterable[tuple[int, int]], windows: Mapping[int | None, int] = EVERYTHING) -> float:
    """(query, key) pairs of the tokens at each span's positions, [start, end), with those before them; the mean over
    the layers, of which `windows` says how many have each window."""
    spans = list(spans)
    total = sum(
        layers * sum(_pairs(end, window) - _pairs(start, window) for start, end in spans)
        for window, layers in windows.items()
    )
    return total / sum(windows.values())


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a sequence's first tokens."""
    whole = tokens if window is None else min(tokens, window)
    return whole * (whole + 1) // 2 + (tokens - whole) * whole


class GroupedQueryAttention(nn.Module):
    """Attention with fewer key/value heads than query heads (Ainslie et al., arXiv:2305.13245).

    q, k and v are fused into one matrix.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window, self.softcap, self.query_scale = (
            config.window_of(layer),
            config.softcap,
            config.query_scale,
        )
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o = Linear(rows[0], (config.hidden_size,), bias=config.o_bias)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        # over each head, or over the whole width of q and of k
        widths = (self.head_dim, self.head_dim) if config.qk_norm == "head" else rows[:2]
        self.q_norm, self.k_norm = (
            RMSNorm(width, config.rms_eps, config.centred_norms) if config.qk_norm else None
            for width in widths
        )

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
            qk = torch.cat([_normed(q, self.q_norm), _normed(k, self.k_norm)], 1)
        q, k = rotate(qk, *rope).split([heads, kv_heads], 1)
        if self.query_scale != 1.0:
            q = q * self.query_scale
        sinks = None if self.sinks is None else self.sinks[:, None, None]
        rule = Rule(self.window, self.softcap, sinks)
        return self.o(attend(self.layer, q, k, v, rule).reshape(x_NC.shape[0], -1), plus)


def _normed(x_NHD: Tensor, norm: RMSNorm) -> Tensor:
    """Norm each head, or all of them together, as wide as the norm is."""
    return norm(x_NHD.reshape(len(x_NHD), -1, len(norm.weight))).view(x_NHD.shape)
