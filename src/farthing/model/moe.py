"""A mixture of experts (DeepSeekMoE, arXiv:2401.06066) with DeepSeek-V3's gate (arXiv:2412.19437 section 2.1.2).

Every token goes through the shared expert and `top_k` routed ones, and no token is ever dropped: the rows of each
expert are laid side by side, and the experts are one batched product, or a few.

Shapes: N tokens, C model width, E experts, K experts a token, F inner width of an expert, G groups, S rows of all
experts together (N * K and, where experts are padded to one length, what fills them up).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farthing.model.config import ModelConfig, Moe
from farthing.model.feedforward import SwiGLU

PAD_TO = 64  # rows of an expert are rounded up to this, so that few shapes occur and each is planned once
MOST_PADDING = 1.5  # beyond this many rows for each real one, several products are faster than one
GROUPS = 4  # of experts with similar loads


class Routing:
    """What the routers of one forward decide, or what they are told to.

    Args:
        replay: for each layer number the experts to use, [N, K], in place of choosing; the gates are still computed
            from the scores, so gradients reach the router (routing replay, arXiv:2510.11370).
        lengths: of the sequences that lie one after another, for the balance loss.
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

    def note(self, layer: int, moe: Moe, scores_NE: Tensor, chosen_NK: Tensor) -> None:
        """Called by each layer with its scores, before any correction, and its choice."""
        self.chosen[layer] = chosen_NK
        self.loads[layer] = torch.bincount(chosen_NK.flatten(), minlength=moe.experts)
        if self._balance:
            loss = self._balance * self._sequence_loss(moe, scores_NE)
            self.loss = loss if self.loss is None else self.loss + loss

    def _sequence_loss(self, moe: Moe, scores_NE: Tensor) -> Tensor:
        """Mean over the sequences of sum_i f_i P_i (arXiv:2412.19437 eq. 17 to 20). As there, f counts the best of the
        scores themselves: the choice, once corrected, would look balanced and leave the scores nothing to learn."""
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
        at = self._sequence[:, None] * moe.experts + best_NK
        counts = torch.bincount(at.flatten(), minlength=len(lengths) * moe.experts).view(-1, moe.experts)
        frequency = counts * (moe.experts / moe.top_k) / lengths[:, None]
        return (frequency * mean_share).sum(-1).mean()


class Router(nn.Module):
    """Scores the experts for each token and chooses. All of it in float32: near-ties would flip in less."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe, self.layer = config.moe, layer
        self.weight = nn.Parameter(torch.zeros(self.moe.experts, config.hidden_size))
        # Moved by `update_biases`, never by a gradient; float32 whatever the network is in.
        self.bias = (
            nn.Parameter(torch.zeros(self.moe.experts), requires_grad=False) if self.moe.bias else None
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        bias = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if self.bias is not None and bias is not None and self.bias.dtype != torch.float32:
            self.bias.data = bias.to(self.bias.device, torch.float32)  # as it was, not rounded and back
        return self

    def forward(self, x_NC: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor]:
        """(gates [N, K] float32, experts [N, K])."""
        moe = self.moe
        logits_NE = F.linear(x_NC.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if moe.scoring == "sigmoid" else logits_NE.softmax(-1)
        if routing is not None and routing.replay is not None:
            chosen_NK = routing.replay[self.layer]
        else:
            chosen_NK = self._choose(scores_NE.detach())
        gates_NK = scores_NE.gather(1, chosen_NK)
        if moe.normalise:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        if routing is not None:
            routing.note(self.layer, moe, scores_NE, chosen_NK)
        return gates_NK * moe.scale, chosen_NK

    def _choose(self, scores_NE: Tensor) -> Tensor:
        moe = self.moe
        if self.bias is not None:
            scores_NE = scores_NE + self.bias
        if moe.groups > 1:
            scores_NGE = scores_NE.view(len(scores_NE), moe.groups, -1)
            # V3 scores a group by its best two experts, V2 (arXiv:2405.04434 section 2.2.2) by its best one; what
            # tells them apart in every engine that reads both is the correction.
            best = scores_NGE.topk(2, -1).values.sum(-1) if moe.bias else scores_NGE.amax(-1)
            keep = torch.zeros_like(best, dtype=torch.bool)
            keep.scatter_(1, best.topk(moe.top_groups, -1, sorted=False).indices, True)
            scores_NE = scores_NGE.masked_fill(~keep[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(moe.top_k, -1, sorted=False).indices


class Experts(nn.Module):
    """The routed experts: SwiGLU each, their matrices stacked."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Sum over its experts of gate times expert, for every token, [N, C]."""
        gates_NK = gates_NK.to(x_NC.dtype)
        if not torch.is_grad_enabled() and chosen_NK.numel() < len(self.gate_up):
            return self._few(x_NC, gates_NK, chosen_NK)
        rows = _Rows.of(chosen_NK, len(self.gate_up), _ragged_works(x_NC, self.inner))
        return _Mixture.apply(x_NC, gates_NK, self.gate_up, self.down, rows)

    def _few(self, x_NC: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """For less than a row an expert: reads the weights of the chosen experts alone."""
        out_NC = torch.zeros_like(x_NC)
        for expert in chosen_NK.unique().tolist():
            token, place = (chosen_NK == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x_NC[token], self.gate_up[expert]).chunk(2, -1)
            inner = F.silu(gate).mul_(up).mul_(gates_NK[token, place, None])
            out_NC.index_add_(0, token, F.linear(inner, self.down[expert]))
        return out_NC


@dataclass(frozen=True)
class _Rows:
    """Where each expert's rows lie, one expert's after another's, and how all of them are multiplied.

    Padded to one length they are one batched product. When the loads differ too much for that, a GPU has a product
    over ragged rows; elsewhere experts with similar loads are padded together, a batched product for each group.
    """

    source_S: Tensor  # the token a row is taken from; 0 for filling
    row_NK: Tensor  # the row of a token's k-th expert
    ends_E: Tensor | None = None  # of the experts' rows, for the ragged product
    order_E: Tensor | None = None  # the experts as their rows lie, where they are in groups
    groups: tuple[tuple[int, int], ...] = ()  # (experts, rows of each)

    @staticmethod
    def of(chosen_NK: Tensor, experts: int, may_be_ragged: bool) -> _Rows:
        flat = chosen_NK.flatten()
        counts_E = torch.bincount(flat, minlength=experts)
        most = _padded(int(counts_E.max()))
        kinds: dict[str, Any] = {}
        if experts * most <= max(MOST_PADDING * len(flat), PAD_TO * experts):
            lengths_E = torch.full_like(counts_E, most)
            starts_E = lengths_E.cumsum(0) - lengths_E
        elif may_be_ragged:
            lengths_E, kinds["ends_E"] = counts_E, counts_E.cumsum(0).to(torch.int32)
            starts_E = lengths_E.cumsum(0) - lengths_E
        else:
            sorted_E, order_E = counts_E.sort(descending=True)
            parts = [part for part in sorted_E.tensor_split(GROUPS) if len(part)]
            groups = tuple((len(part), _padded(int(part[0]))) for part in parts)
            lengths_E = torch.cat([counts_E.new_full((count,), rows) for count, rows in groups])
            starts_E = torch.empty_like(counts_E)
            starts_E[order_E] = lengths_E.cumsum(0) - lengths_E
            kinds |= {"order_E": order_E, "groups": groups}
        order = flat.argsort(stable=True)
        expert = flat[order]
        nth = torch.arange(len(flat), device=flat.device) - (counts_E.cumsum(0) - counts_E)[expert]
        place = starts_E[expert] + nth
        row = torch.empty_like(flat)
        row[order] = place
        source_S = flat.new_zeros(int(lengths_E.sum()))
        source_S[place] = order // chosen_NK.shape[1]
        return _Rows(source_S, row.view_as(chosen_NK), **kinds)

    def product(self, x_SA: Tensor, weight_EBA: Tensor, transposed: bool = False) -> Tensor:
        """Each expert's rows times its matrix transposed, [S, B]; times the matrix as it is if `transposed`."""
        if self.order_E is not None:
            weight_EBA = weight_EBA.index_select(0, self.order_E)
        weight = weight_EBA if transposed else weight_EBA.transpose(1, 2)
        if self.ends_E is not None:
            return F.grouped_mm(x_SA, weight, offs=self.ends_E)
        if self.order_E is None:
            return torch.bmm(x_SA.view(len(weight), -1, x_SA.shape[-1]), weight).flatten(0, 1)
        out_SB = x_SA.new_empty(len(x_SA), weight.shape[-1])
        pieces = weight.split([count for count, _ in self.groups])
        for x, piece, out in zip(self._split(x_SA), pieces, self._split(out_SB), strict=True):
            torch.bmm(x, piece, out=out)
        return out_SB

    def outer(self, x_SA: Tensor, y_SB: Tensor, experts: int) -> Tensor:
        """Each expert's sum over its rows of x times y, [E, A, B]."""
        if self.ends_E is not None:
            return F.grouped_mm(x_SA.t(), y_SB, offs=self.ends_E)
        if self.order_E is None:
            x_EAR = x_SA.view(experts, -1, x_SA.shape[-1]).transpose(1, 2)
            return torch.bmm(x_EAR, y_SB.view(experts, -1, y_SB.shape[-1]))
        parts = zip(self._split(x_SA), self._split(y_SB), strict=True)
        sorted_EAB = torch.cat([torch.bmm(x.transpose(1, 2), y) for x, y in parts])
        return torch.empty_like(sorted_EAB).index_copy_(0, self.order_E, sorted_EAB)

    def _split(self, t_SA: Tensor) -> list[Tensor]:
        """Each group's rows, [experts, rows, A]."""
        parts = t_SA.split([count * rows for count, rows in self.groups])
        return [part.view(count, rows, -1) for part, (count, rows) in zip(parts, self.groups, strict=True)]


def _padded(rows: int) -> int:
    return max(1, -(-rows // PAD_TO)) * PAD_TO


def _ragged_works(x_NC: Tensor, inner: int) -> bool:
    """Whether torch's product over ragged rows is there and fast: bfloat16 on an A100 or later, with rows, of the
    model's and of the experts' width, in multiples of 16 bytes. On a CPU it plans every new shape, at 30 ms a call."""
    if x_NC.device.type != "cuda" or x_NC.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    aligned = all(n * x_NC.element_size() % 16 == 0 for n in (x_NC.shape[-1], inner))
    return aligned and torch.cuda.get_device_capability(x_NC.device) >= (8, 0)


class _Mixture(torch.autograd.Function):
    """The experts' forward and backward in one piece: keeps the inputs and the inner products alone, and moves rows by
    fused gather-and-sum. Filling rows have gate 0, so nothing of them arrives anywhere."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, rows: _Rows
    ) -> Tensor:
        x_SC = x_NC.index_select(0, rows.source_S)
        gate_S = gates_NK.new_zeros(len(rows.source_S))
        gate_S[rows.row_NK.flatten()] = gates_NK.flatten()
        inner_S2F = rows.product(x_SC, gate_up)
        gate, up = inner_S2F.chunk(2, -1)
        act_SF = F.silu(gate).mul_(up).mul_(gate_S[:, None])
        y_SC = rows.product(act_SF, down)
        ctx.save_for_backward(x_NC, gate_up, down, inner_S2F, gate_S)
        ctx.rows = rows
        return F.embedding_bag(rows.row_NK, y_SC, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_NC, gate_up, down, inner_S2F, gate_S = ctx.saved_tensors
        rows: _Rows = ctx.rows
        experts = len(gate_up)
        x_SC = x_NC.index_select(0, rows.source_S)
        grad_SC = grad_NC.index_select(0, rows.source_S)
        gate, up = inner_S2F.chunk(2, -1)
        silu = F.silu(gate)
        act_SF = silu * up
        grad_act = rows.product(grad_SC, down, transposed=True)
        grad_gates = (grad_act * act_SF).sum(-1)[rows.row_NK]
        grad_act.mul_(gate_S[:, None])
        grad_down = rows.outer(grad_SC, act_SF.mul_(gate_S[:, None]), experts)
        grad_inner = torch.empty_like(inner_S2F)
        half_gate, half_up = grad_inner.chunk(2, -1)
        torch.mul(grad_act, silu, out=half_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=half_gate)
        grad_gate_up = rows.outer(grad_inner, x_SC, experts)
        grad_x = F.embedding_bag(rows.row_NK, rows.product(grad_inner, gate_up, transposed=True), mode="sum")
        return grad_x, grad_gates, grad_gate_up, grad_down, None


class MixtureOfExperts(nn.Module):
    """The feed-forward half of a layer with routed and shared experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        moe, hidden = config.moe, config.hidden_size
        self.router = Router(config, layer)
        self.experts = Experts(moe.experts, hidden, moe.expert_size)
        self.shared = SwiGLU(hidden, moe.shared * moe.expert_size) if moe.shared else None

    def forward(self, x_NC: Tensor, plus: Tensor, routing: Routing | None) -> Tensor:
        plus = plus + self.experts(x_NC, *self.router(x_NC, routing))
        return plus if self.shared is None else self.shared(x_NC, plus=plus)


def routers(network: nn.Module) -> Iterator[Router]:
    """Every router of a network, in the order of its layers."""
    return (module for module in network.modules() if isinstance(module, Router))


@torch.no_grad()
def update_biases(network: nn.Module, loads: Mapping[int, Tensor], rate: float) -> None:
    """Move each router's correction by `rate` towards experts with less than the mean load, then centre it.

    Auxiliary-loss-free balancing (arXiv:2408.15664; arXiv:2412.19437 section 2.1.2): once an optimizer step, with the
    loads ([E] tokens for each layer number) of the whole global batch. Centring changes no choice and keeps it small.
    """
    for router in routers(network):
        if router.bias is not None and router.layer in loads:
            load = loads[router.layer].float()
            router.bias.add_(rate * (load.mean() - load).sign())
            router.bias.sub_(router.bias.mean())
