"""Grouped-query attention, and the ways a set of tokens can attend.

A layer projects and rotates; *what attends to what, and where keys are kept* is the business of the `Attend` it is
handed. Training hands it `Segments`, the engine its paged cache, and the network stays one. Latent attention
(`model.latent`) hands over what it would cache and lets the `Attend` choose between its two forms.

Shapes: N tokens (of all sequences, flat), H query heads, G key/value heads, D head width, E value width (D, or less in
latent attention), P prefix, S suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.config import ModelConfig
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import rotate

if TYPE_CHECKING:
    from farthing.model.latent import LatentAttention

DENSE_LENGTH = (
    1024  # up to here a prompt with its samples is one product with a mask, which wastes less than it saves
)
JOIN_LENGTH = 256  # of short documents that are computed together
SHORT_LENGTH = (
    512  # up to here the backward pass is faster written out than in torch's CPU kernel, by 3 at 256
)


class Attend(Protocol):
    """Attention proper for layer number `layer`: q [N, H, D], k [N, G, D], v [N, G, E] -> [N, H, E].

    `latent` does the same for a `LatentAttention`, given its queries, latents and shared rotated keys.
    """

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, /) -> Tensor: ...

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor, /) -> Tensor: ...


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
        self._computed = _joined(self.segments)
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
        """Who sees whom within computed segment `number`: [n, n], 0 where allowed and -inf elsewhere."""
        if number not in self._masks:
            prefix, suffixes = self._computed[number]
            sizes = torch.tensor([prefix, *suffixes])
            part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            seen = ((part[None, :] == 0) | (part[None, :] == part[:, None])).tril()
            mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[number] = mask.to(like.device)
        return self._masks[number]

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """The expanded form: every head's own keys and values, as in ordinary attention."""
        return self(attention.layer, q_NHD, *attention.expand(c_NL, r_NR))

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor) -> Tensor:
        if self.rectangle:
            rows, length = self.rectangle
            q, k, v = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGE))
            return _attention(q, k, v, None).transpose(1, 2).flatten(0, 1)
        sizes = [sum((prefix, *suffixes)) for prefix, suffixes in self._computed]
        pieces = zip(*(t.transpose(0, 1).split(sizes, 1) for t in (q_NHD, k_NGD, v_NGE)), strict=True)
        outs = []
        for number, (q, k, v) in enumerate(pieces):
            prefix, suffixes = self._computed[number]
            if not suffixes:
                outs.append(sequence_attention(q, k, v, None))
            elif q.shape[1] <= DENSE_LENGTH:
                outs.append(sequence_attention(q, k, v, self._tree_mask(number, q)))
            else:
                outs += _branches(q, k, v, prefix, suffixes)
        return torch.cat(outs, 1).transpose(0, 1)


def _joined(segments: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """The same segments with short documents that are neighbours made suffixes of one empty prefix, which says the
    same: one product with a mask over them beats many tiny ones."""
    out: list[tuple[int, list[int]]] = []
    for prefix, suffixes in segments:
        if suffixes or prefix > JOIN_LENGTH:
            out.append((prefix, list(suffixes)))
        elif out and out[-1][0] == 0 and sum(out[-1][1]) + prefix <= JOIN_LENGTH:
            out[-1][1].append(prefix)
        else:
            out.append((0, [prefix]))
    return [(parts[0], []) if prefix == 0 and len(parts) == 1 else (prefix, parts) for prefix, parts in out]


def _branches(q_HND: Tensor, k_GND: Tensor, v_GND: Tensor, prefix: int, suffixes: list[int]) -> list[Tensor]:
    """The prefix and each suffix by themselves: many small products, but no mask over the whole segment."""
    pieces = zip(*(t.split([prefix, *suffixes], 1) for t in (q_HND, k_GND, v_GND)), strict=True)
    q, k, v = next(pieces)
    outs = [sequence_attention(q, k, v, None)]
    for q_s, k_s, v_s in pieces:
        new = q_s.shape[1]
        mask = torch.ones(new, prefix + new, dtype=torch.bool, device=q.device).tril(diagonal=prefix)
        outs.append(sequence_attention(q_s, torch.cat([k, k_s], 1), torch.cat([v, v_s], 1), mask))
    return outs


def sequence_attention(q_HLD: Tensor, k_GMD: Tensor, v_GME: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence's attention, [H, L, E]; without a mask it is causal."""
    return _attention(q_HLD[None], k_GMD[None], v_GME[None], mask)[0]


def _attention(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None) -> Tensor:
    """A batch's attention, [B, H, L, E], in the fastest way there is for it."""
    on_cpu = q_BHLD.device.type == "cpu"
    if (
        on_cpu
        and torch.is_grad_enabled()
        and q_BHLD.shape[2] <= SHORT_LENGTH
        and q_BHLD.dtype == torch.bfloat16
    ):
        return _ShortAttention.apply(q_BHLD, k_BGMD, v_BGME, mask)
    return _fused(q_BHLD, k_BGMD, v_BGME, mask)


def _fused(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None) -> Tensor:
    width, missing = v_BGME.shape[-1], q_BHLD.shape[-1] - v_BGME.shape[-1]
    if missing > 0 and q_BHLD.device.type == "cpu":
        # torch's CPU kernel wants values as wide as queries; without it this takes ten times as long
        v_BGME = F.pad(v_BGME, (0, missing))
    out = F.scaled_dot_product_attention(
        q_BHLD, k_BGMD, v_BGME, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[..., :width]


class _ShortAttention(torch.autograd.Function):
    """Attention whose backward pass computes the weights again as one matrix a head: five products and a softmax."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q_BHLD, k_BGMD, v_BGME, mask)
        return _fused(q_BHLD, k_BGMD, v_BGME, mask)

    @staticmethod
    def backward(ctx: Any, grad_BHLE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHLD, k_BGMD, v_BGME, mask = ctx.saved_tensors
        _, heads, length, width = q_BHLD.shape
        shared = heads // k_BGMD.shape[1]  # query heads that share a key head are rows of the same product
        q, k, v, grad = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q_BHLD, k_BGMD, v_BGME, grad_BHLE))
        q, grad = (t.reshape(len(k), shared * length, -1) for t in (q, grad))
        if mask is None:
            mask = q.new_full((length, k.shape[1]), -torch.inf).triu(1)
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        scale = width**-0.5
        weights = torch.baddbmm(mask.repeat(shared, 1), q, k.transpose(1, 2), alpha=scale).softmax(-1)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, q.dtype)
        grad_q = torch.bmm(grad_scores, k * scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q * scale)
        return grad_q.view_as(q_BHLD), grad_k.view_as(k_BGMD), grad_v.view_as(v_BGME), None


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
