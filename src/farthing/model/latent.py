"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1; the same in V3).

The keys and values of all heads come from one short latent per token, so a cache keeps only the latent and one rotated
key that the heads share. Two forms give the same result:

* expanded: compute each head's keys and values from the latents, then run ordinary attention. Fewest FLOPs when many
  queries share their keys: training and prefill.
* absorbed: apply the key projection to the query and the value projection after the sum, which leaves multi-query
  attention over the latents. Least memory traffic per query: decoding.

Shapes: N tokens, M cached tokens, C model width, H heads, L latent, R rotated width, P width without position,
D = P + R, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from farthing.model.attention import Attend
from farthing.model.config import ModelConfig
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import rotate

# transformers and DeepSeek's own code use this epsilon inside attention, whatever rms_norm_eps says.
LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention through a shared latent.

    A head's rows of `q_b` (or of the first part of `qkv_a`) are P then R; those of `kv_b` are P then E. Rotated
    elements are stored as two halves, not as neighbouring pairs.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mla is not None
        self.layer, self.heads, self.widths = layer, config.num_heads, config.mla
        mla, hidden = config.mla, config.hidden_size
        queries = self.heads * mla.qk_dim
        self.qkv_a = Linear(hidden, (mla.q_lora_rank or queries, mla.cache_dim))
        self.q_norm = RMSNorm(mla.q_lora_rank, LATENT_EPS) if mla.q_lora_rank else None
        self.q_b = Linear(mla.q_lora_rank, (queries,)) if mla.q_lora_rank else None
        self.kv_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS)
        self.kv_b = Linear(mla.kv_lora_rank, (self.heads * (mla.nope_dim + mla.v_dim),))
        self.o = Linear(self.heads * mla.v_dim, (hidden,))
        self.score_scale = config.rope.score_scale

    def forward(
        self, x_NC: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, plus: Tensor | None = None
    ) -> Tensor:
        mla = self.widths
        q, c_NL, r_NR = self.qkv_a(x_NC).split([self.qkv_a.parts[0], mla.kv_lora_rank, mla.rope_dim], -1)
        if self.q_b is not None and self.q_norm is not None:
            q = self.q_b(self.q_norm(q))
        q_nope, q_rope = q.view(-1, self.heads, mla.qk_dim).split([mla.nope_dim, mla.rope_dim], -1)
        q_NHD = torch.cat([q_nope, rotate(q_rope, *rope)], -1)
        if self.score_scale != 1.0:
            q_NHD = q_NHD * self.score_scale
        r_NR = rotate(r_NR[:, None], *rope)[:, 0]
        out_NHE = attend.latent(self, q_NHD, self.kv_norm(c_NL), r_NR)
        return self.o(out_NHE.reshape(len(x_NC), -1), plus)

    def expand(self, c_ML: Tensor, r_MR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys [M, H, D] and values [M, H, E] of latents and shared rotated keys."""
        mla = self.widths
        kv = self.kv_b(c_ML).view(-1, self.heads, mla.nope_dim + mla.v_dim)
        k_nope, v_MHE = kv.split([mla.nope_dim, mla.v_dim], -1)
        return torch.cat([k_nope, r_MR[:, None].expand(-1, self.heads, -1)], -1), v_MHE

    def absorb(self, q_NHD: Tensor) -> Tensor:
        """Return queries for [latent | rotated key], [N, H, L + R]: the key projection is applied to them instead."""
        mla = self.widths
        q_nope, q_rope = q_NHD.split([mla.nope_dim, mla.rope_dim], -1)
        up_HPL, _ = self._up()
        absorbed = torch.bmm(q_nope.transpose(0, 1), up_HPL).transpose(0, 1)
        return torch.cat([absorbed, q_rope], -1)

    def unabsorb(self, out_NHL: Tensor) -> Tensor:
        """Project attention-weighted latents to values, [N, H, E]."""
        _, up_HEL = self._up()
        return torch.bmm(out_NHL.transpose(0, 1), up_HEL.transpose(1, 2)).transpose(0, 1)

    def _up(self) -> tuple[Tensor, Tensor]:
        mla = self.widths
        weight = self.kv_b.merged().view(self.heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank)
        nope, value = weight.split([mla.nope_dim, mla.v_dim], 1)
        return nope, value
