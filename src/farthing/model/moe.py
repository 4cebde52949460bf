"""Mixture of experts (DeepSeekMoE, arXiv:2401.06066) with DeepSeek-V3's gate (arXiv:2412.19437 section 2.1.2).

Every token goes through the shared experts and `top_k` routed ones; no token is dropped. `kernels.experts` multiplies
the experts.

Shapes: N tokens, C model width, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farthing.model.config import ModelConfig, Moe
from farthing.model.feedforward import SwiGLU
from farthing.model.kernels.experts import mixture


class Routing:
    """The routers' choices in one forward pass, recorded or replayed.

    Args:
        replay: experts to use by layer number, [N, K], instead of choosing. The gates are still computed from the
            scores, so gradients reach the router (routing replay, arXiv:2510.11370).
        lengths: lengths of the concatenated sequences, for the balance loss.
        balance: weight of the sequence-wise balance loss, alpha in arXiv:2412.19437 eq. 17; 0 computes none.
    """

    def __init__(
        self,
        replay: Mapping[int, Tensor] | None = None,
        lengths: Sequence[int] | None = None,
        balance: float = 0.0,
    ) -> None:
        assert not balance or lengths is not None
        self.replay = replay
        self.chosen: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}
        self.loss: Tensor | None = None
        self._balance, self._lengths = balance, lengths
        self._sequence: Tensor | None = None

    def record(self, layer: int, moe: Moe, scores_NE: Tensor, chosen_NK: Tensor) -> None:
        """Record a layer's scores, before any correction, and its choice."""
        self.chosen[layer] = chosen_NK
        self.loads[layer] = torch.bincount(chosen_NK.flatten(), minlength=moe.experts)
        if self._balance:
            loss = self._balance * self._sequence_loss(moe, scores_NE)
            self.loss = loss if self.loss is None else self.loss + loss

    def _sequence_loss(self, moe: Moe, scores_NE: Tensor) -> Tensor:
        """Mean over the sequences of sum_i f_i P_i (arXiv:2412.19437 eq. 17 to 20).

        As in the paper, f counts the top experts by the uncorrected scores: the corrected choice looks balanced and
        would leave the scores nothing to learn.
        """
        assert self._lengths is not None
        lengths = torch.tensor(self._lengths, device=scores_NE.device)
        if self._sequence is None:
            self._sequence = torch.repeat_interleave(
                torch.arange(len(lengths), device=lengths.device), lengths
            )
        sums = scores_NE.new_zeros(len(lengths), moe.experts)
        share = (scores_NE / scores_NE.sum(-1, keepdim=True)).float()
        mean_share = sums.index_add(0, self._sequence, share) / lengths[:, None]
        best_NK = scores_NE.detach().topk(moe.top_k, -1, sorted=False).indices
        slot_NK = self._sequence[:, None] * moe.experts + best_NK
        counts = torch.bincount(slot_NK.flatten(), minlength=len(lengths) * moe.experts).view(-1, moe.experts)
        frequency = counts * (moe.experts / moe.top_k) / lengths[:, None]
        return (frequency * mean_share).sum(-1).mean()


class Router(nn.Module):
    """Scores the experts for each token and chooses, in float32: lower precision would flip near-ties."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe, self.layer = config.moe, layer
        self.weight = nn.Parameter(torch.zeros(self.moe.experts, config.hidden_size))
        # Updated by `update_biases`, never by a gradient; float32 in a network of any dtype.
        self.logit_bias = nn.Parameter(torch.zeros(self.moe.experts)) if self.moe.router_bias else None
        self.bias = (
            nn.Parameter(torch.zeros(self.moe.experts), requires_grad=False) if self.moe.bias else None
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        bias = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if self.bias is not None and bias is not None and self.bias.dtype != torch.float32:
            self.bias.data = bias.to(self.bias.device, torch.float32)  # the original, not the rounded copy
        return self

    def forward(self, x_NC: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor]:
        """Return (gates [N, K] float32, experts [N, K])."""
        moe = self.moe
        bias_E = None if self.logit_bias is None else self.logit_bias.float()
        logits_NE = F.linear(x_NC.float(), self.weight.float(), bias_E)
        scores_NE = logits_NE.sigmoid() if moe.scoring == "sigmoid" else logits_NE.softmax(-1)
        if routing is not None and routing.replay is not None:
            chosen_NK = routing.replay[self.layer]
        else:
            chosen_NK = self._choose(scores_NE.detach())
        gates_NK = scores_NE.gather(1, chosen_NK)
        if moe.normalise:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        if routing is not None:
            routing.record(self.layer, moe, scores_NE, chosen_NK)
        return gates_NK * moe.scale, chosen_NK

    def _choose(self, scores_NE: Tensor) -> Tensor:
        moe = self.moe
        if self.bias is not None:
            scores_NE = scores_NE + self.bias
        if moe.groups > 1:
            scores_NGE = scores_NE.view(len(scores_NE), moe.groups, -1)
            # V3 scores a group by its best two experts, V2 (arXiv:2405.04434 section 2.2.2) by its best one. Every
            # engine that reads both tells them apart by the correction.
            best = scores_NGE.topk(2, -1).values.sum(-1) if moe.bias else scores_NGE.amax(-1)
            keep = torch.zeros_like(best, dtype=torch.bool)
            keep.scatter_(1, best.topk(moe.top_groups, -1, sorted=False).indices, True)
            scores_NE = scores_NGE.masked_fill(~keep[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(moe.top_k, -1, sorted=False).indices


class Experts(nn.Module):
    """The routed experts, each a SwiGLU, with stacked matrices."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Return each token's sum over its experts of gate * expert(x), [N, C]."""
        return mixture(x_NC, gates_NK.to(x_NC.dtype), chosen_NK, self.gate_up, self.down)


class BoundedExperts(nn.Module):
    """gpt-oss's experts (arXiv:2508.10925 section 2.3): biases, inner products bounded by a limit, and a SwiGLU of its
    own, gate * sigmoid(1.702 gate) * (up + 1).

    Matrices lie as in its folders, [inputs, outputs], with gate and up in turns. One expert is computed after another,
    and again in the backward pass, which keeps nothing of them.
    """

    ALPHA = 1.702

    def __init__(self, experts: int, hidden: int, inner: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Return each token's sum over its experts of gate * expert(x), [N, C]."""
        if torch.is_grad_enabled():
            inputs = (x_NC, gates_NK, chosen_NK)
            out: Tensor = checkpoint(self._mixture, *inputs, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._mixture(x_NC, gates_NK, chosen_NK)

    def _mixture(self, x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        parameters = (self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        experts = list(zip(*(parameter.unbind(0) for parameter in parameters), strict=True))
        out_NC = torch.zeros_like(x_NC)
        for number in chosen_NK.unique().tolist():
            token, place = (chosen_NK == number).nonzero(as_tuple=True)
            gate_up, gate_up_bias, down, down_bias = experts[number]
            inner = torch.addmm(gate_up_bias, x_NC[token], gate_up)
            gate = inner[:, ::2].clamp(max=self.limit)
            up = inner[:, 1::2].clamp(-self.limit, self.limit)
            out = torch.addmm(down_bias, gate * torch.sigmoid(self.ALPHA * gate) * (up + 1), down)
            out_NC = out_NC.index_add(0, token, out * gates_NK[token, place, None].to(out.dtype))
        return out_NC


class MixtureOfExperts(nn.Module):
    """The feed-forward half of a layer with routed and shared experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        moe, hidden = config.moe, config.hidden_size
        self.router = Router(config, layer)
        sizes = (moe.experts, hidden, moe.expert_size)
        self.experts = Experts(*sizes) if moe.limit is None else BoundedExperts(*sizes, moe.limit)
        self.shared = SwiGLU(hidden, moe.shared * moe.expert_size) if moe.shared else None

    def forward(self, x_NC: Tensor, plus: Tensor | None, routing: Routing | None) -> Tensor:
        out = self.experts(x_NC, *self.router(x_NC, routing))
        if plus is not None:
            out = plus + out
        return out if self.shared is None else self.shared(x_NC, plus=out)


def routers(network: nn.Module) -> Iterator[Router]:
    """Iterate over the routers of a network, in layer order."""
    return (module for module in network.modules() if isinstance(module, Router))


@torch.no_grad()
def update_biases(network: nn.Module, loads: Mapping[int, Tensor], rate: float) -> None:
    """Move each router's correction by `rate` towards experts with less than the mean load, then centre it.

    Auxiliary-loss-free balancing (arXiv:2408.15664; arXiv:2412.19437 section 2.1.2). Call it once per optimizer step
    with the loads (tokens [E] by layer number) of the whole global batch. Centring changes no choice and keeps the
    correction small.
    """
    for router in routers(network):
        if router.bias is not None and router.layer in loads:
            load = loads[router.layer].float()
            router.bias.add_(rate * (load.mean() - load).sign())
            router.bias.sub_(router.bias.mean())
