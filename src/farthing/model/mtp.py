"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437 section 2.2): modules that each predict one token further.

Module k reads the previous module's output for token i (for the first, the decoder's final norm) and token i + k, and
predicts token i + k + 1 through the decoder's own embedding and head. DeepSeek's weights take the two inputs in the
order [embedding, hidden], the reverse of the paper's equation 21.

Shapes: N tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from farthing.model.attention import Attend
from farthing.model.config import ModelConfig
from farthing.model.layers import Linear, RMSNorm
from farthing.model.moe import Routing


class MultiTokenPredictor(nn.Module):
    """One module: norm and join both inputs, a layer like the decoder's last, a norm. `depth` counts from 0."""

    def __init__(self, config: ModelConfig, depth: int, layer: nn.Module) -> None:
        super().__init__()
        self.depth = depth
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.join = Linear(2 * config.hidden_size, (config.hidden_size,))
        self.layer = layer
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(
        self,
        embedded_NC: Tensor,
        hidden_NC: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        routing: Routing | None,
    ) -> Tensor:
        """Return the input of the head and of the next module, [N, C].

        The next module reads the normed output, as in transformers; vLLM passes it the output before the norm.
        """
        both = torch.cat([self.embedding_norm(embedded_NC), self.hidden_norm(hidden_NC)], -1)
        out: Tensor = self.norm(self.layer(self.join(both), rope, attend, routing))
        return out
