"""The network: embedding, layers, final norm, head. `ModelConfig` selects the family.

Shapes: B sequences, L their length, N tokens of all sequences (flat), C model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.attention import Attend, GroupedQueryAttention, Segments
from farthing.model.config import ModelConfig, Rope
from farthing.model.feedforward import GeGLU, SwiGLU
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear, RMSNorm
from farthing.model.moe import MixtureOfExperts, Routing
from farthing.model.mtp import MultiTokenPredictor
from farthing.model.rotary import tables


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream, with norms before them, after them or both."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config) if config.norms != "after" else nn.Identity()
        self.attention = (
            LatentAttention(config, index) if config.mla else GroupedQueryAttention(config, index)
        )
        self.attention_out_norm = _norm(config) if config.norms != "before" else None
        self.feedforward_norm = _norm(config) if config.norms != "after" else nn.Identity()
        self.feedforward: MixtureOfExperts | SwiGLU
        if config.is_moe(index):
            self.feedforward = MixtureOfExperts(config, index)
        else:
            kind = GeGLU if config.activation == "gelu" else SwiGLU
            self.feedforward = kind(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.feedforward_out_norm = _norm(config) if config.norms != "before" else None

    def forward(
        self, x_NC: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, routing: Routing | None = None
    ) -> Tensor:
        normed = self.attention_norm(x_NC)
        if self.attention_out_norm is None:  # the last product adds the stream
            x_NC = self.attention(normed, rope, attend, plus=x_NC)
        else:
            x_NC = x_NC + self.attention_out_norm(self.attention(normed, rope, attend))
        normed = self.feedforward_norm(x_NC)
        if self.feedforward_out_norm is None:
            return self._feed(normed, x_NC, routing)
        return x_NC + self.feedforward_out_norm(self._feed(normed, None, routing))

    def _feed(self, normed_NC: Tensor, plus: Tensor | None, routing: Routing | None) -> Tensor:
        if isinstance(self.feedforward, MixtureOfExperts):
            return self.feedforward(normed_NC, plus, routing)
        return self.feedforward(normed_NC, plus)


def _norm(config: ModelConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_eps, config.centred_norms)


class Decoder(nn.Module):
    """A decoder-only transformer over a flat list of tokens; `attend` decides which tokens see each other.

    `stored` is the dtype of the model folders it writes; None means the dtype it computes in. Where matrix products are
    faster in float32 than in bfloat16, the parameters are float32 tensors that hold bfloat16 values, so that training,
    sampling and evaluation use exactly the weights that are written.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stored: torch.dtype | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = _norm(config)
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, depth, Layer(config, config.num_layers + depth))
            for depth in range(config.mtp_depth)
        )
        self.head = Linear(config.hidden_size, (1 if config.scores else config.vocab_size,))
        if config.tied_head:
            self.head.weight = self.embed.weight
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}

    def _ropes_at(self, positions_N: Tensor, dtype: torch.dtype) -> dict[Rope, tuple[Tensor, Tensor]]:
        """The tables of each rotation at these positions, (cos, sin)."""
        needed = int(positions_N.max()) + 1
        found = {}
        for rope in {self.config.rope, self.config.local_rope or self.config.rope}:
            have = self._tables.get(rope)
            if have is None or have[0].shape[0] < needed or have[0].device != positions_N.device:
                length = max(1 << (needed - 1).bit_length(), 256)
                cos, sin = tables(rope, self.config.rotary_dim, length)
                have = self._tables[rope] = (cos.to(positions_N.device), sin.to(positions_N.device))
            cos, sin = have
            found[rope] = cos[positions_N].to(dtype)[:, None], sin[positions_N].to(dtype)[:, None]
        return found

    def hidden(
        self, ids_N: Tensor, positions_N: Tensor, attend: Attend, routing: Routing | None = None
    ) -> Tensor:
        """Return the final norm's output, [N, C]; `logits` of row i predict the token after token i."""
        x_NC = F.embedding(ids_N, self.embed.weight)
        if self.config.embed_scale != 1.0:
            x_NC = x_NC * x_NC.new_tensor(self.config.embed_scale)  # rounded to its dtype, as in transformers
        ropes = self._ropes_at(positions_N, x_NC.dtype)
        for number, layer in enumerate(self.layers):
            x_NC = layer(x_NC, ropes[self.config.rope_of(number)], attend, routing)
        return self.norm(x_NC)

    def mtp_hidden(
        self,
        depth: int,
        ids_N: Tensor,
        hidden_NC: Tensor,
        positions_N: Tensor,
        attend: Attend,
        routing: Routing | None = None,
    ) -> Tensor:
        """Run prediction module `depth` (from 0) over the same tokens, [N, C]; `logits` of row i predict token
        i + depth + 2.

        Args:
            ids_N: for each token, the token depth + 1 positions later (any id past the end of its sequence).
            hidden_NC: output of `hidden`, or of the previous module, for each token.
        """
        embedded = F.embedding(ids_N, self.embed.weight)
        rope = self._ropes_at(positions_N, embedded.dtype)[self.config.rope]
        out: Tensor = self.mtp[depth](embedded, hidden_NC, rope, attend, routing)
        return out

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Return the score of each vocabulary entry, [N, V] float32."""
        logits_NV = self.head(hidden_NC).float()
        if (cap := self.config.logit_softcap) is not None:
            logits_NV = cap * torch.tanh(logits_NV / cap)
        return logits_NV

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return the logits of a rectangular batch without padding, [B, L, V] float32."""
        rows, length = ids_BL.shape
        attend = Segments([(length, ())] * rows)
        positions = torch.arange(length, device=ids_BL.device).repeat(rows)
        return self.logits(self.hidden(ids_BL.flatten(), positions, attend)).view(rows, length, -1)

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Initialise for training from scratch: normal with `std`, projections into the residual stream scaled by
        1/sqrt(2 layers) (GPT-2's rule), norms at one, biases at zero."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(0.0 if self.config.centred_norms else 1.0)
            else:
                scale = residual_std if name.endswith(("o.weight", "down.weight", "experts.down")) else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
