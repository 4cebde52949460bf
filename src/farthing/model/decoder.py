"""The network: embedding, layers, final norm, head. `ModelConfig` selects the family.

Shapes: B sequences, L their length, N tokens of all sequences (flat), C model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.attention import Attend, GroupedQueryAttention, Segments
from farthing.model.config import ModelConfig
from farthing.model.feedforward import SwiGLU
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear, RMSNorm
from farthing.model.moe import MixtureOfExperts, Routing
from farthing.model.mtp import MultiTokenPredictor
from farthing.model.rotary import tables


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.attention = (
            LatentAttention(config, index) if config.mla else GroupedQueryAttention(config, index)
        )
        self.feedforward_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.feedforward: MixtureOfExperts | SwiGLU
        if config.is_moe(index):
            self.feedforward = MixtureOfExperts(config, index)
        else:
            self.feedforward = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(
        self, x_NC: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, routing: Routing | None = None
    ) -> Tensor:
        x_NC = self.attention(self.attention_norm(x_NC), rope, attend, plus=x_NC)
        normed = self.feedforward_norm(x_NC)
        if isinstance(self.feedforward, MixtureOfExperts):
            return self.feedforward(normed, x_NC, routing)
        return self.feedforward(normed, plus=x_NC)


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
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, depth, Layer(config, config.num_layers + depth))
            for depth in range(config.mtp_depth)
        )
        self.head = Linear(config.hidden_size, (config.vocab_size,))
        if config.tied_head:
            self.head.weight = self.embed.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    def _rope_at(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        needed = int(positions_N.max()) + 1
        if (
            self._rope is None
            or self._rope[0].shape[0] < needed
            or self._rope[0].device != positions_N.device
        ):
            length = max(1 << (needed - 1).bit_length(), 256)
            cos, sin = tables(self.config.rope, self.config.rotary_dim, length)
            self._rope = (cos.to(positions_N.device), sin.to(positions_N.device))
        cos, sin = self._rope
        return cos[positions_N].to(dtype)[:, None], sin[positions_N].to(dtype)[:, None]

    def hidden(
        self, ids_N: Tensor, positions_N: Tensor, attend: Attend, routing: Routing | None = None
    ) -> Tensor:
        """Return the final norm's output, [N, C]; `logits` of row i predict the token after token i."""
        x_NC = F.embedding(ids_N, self.embed.weight)
        rope = self._rope_at(positions_N, x_NC.dtype)
        for layer in self.layers:
            x_NC = layer(x_NC, rope, attend, routing)
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
        rope = self._rope_at(positions_N, embedded.dtype)
        out: Tensor = self.mtp[depth](embedded, hidden_NC, rope, attend, routing)
        return out

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Return the score of each vocabulary entry, [N, V] float32."""
        return self.head(hidden_NC).float()

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
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                scale = residual_std if name.endswith(("o.weight", "down.weight", "experts.down")) else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
