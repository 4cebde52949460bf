"""Optimizers over float32 master weights, whatever the network computes in.

A bfloat16 weight of 0.05 cannot take a step smaller than 2e-4, larger than most steps. So the optimizer works on
float32 copies, gradients are summed into them as they arrive, and each step rewrites the network, rounded to the
dtype of its folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farthing.base.device import Ranks
from farthing.model import Decoder
from farthing.model.kernels import adamw
from farthing.model.kernels.adamw import CompiledAdamW
from farthing.model.layers import Linear, Lora
from farthing.model.moe import Experts

MOMENTUM = 0.95  # of Muon


@dataclass
class _Master:
    """Rows of one network parameter and the float32 copy that is optimized in their place."""

    source: nn.Parameter
    rows: slice
    copy: nn.Parameter
    fresh: bool = True  # no gradient has arrived since the last step; the buffer holds an old one


class MasterWeights:
    """The trainable parameters of a network, in float32, under AdamW or Muon.

    Args:
        kind: `adamw` (Loshchilov and Hutter, arXiv:1711.05101) for everything, or `muon` (Jordan 2024; with
            Moonlight's update scale 0.2 sqrt(max(rows, columns)), arXiv:2502.16982 section 2.2) for the
            matrices inside the layers and AdamW for embedding, head, norms, routers and biases. Matrices that
            the network fuses or stacks are optimized apart.
    """

    def __init__(
        self, network: nn.Module, kind: str, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.stored = network.stored if isinstance(network, Decoder) else None
        self.masters: list[_Master] = []
        self.hooks = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        stacks: list[dict[str, Any]] = []
        parts_of = {
            id(module.weight): module.parts for module in network.modules() if isinstance(module, Linear)
        }
        rows_of: dict[int, int] = {}  # of one matrix in a stack
        for module in network.modules():
            if isinstance(module, Experts):
                rows_of |= {id(module.gate_up): module.inner, id(module.down): module.down.shape[1]}
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            if kind == "muon" and id(parameter) in rows_of:
                copy = nn.Parameter(parameter.detach().float().clone())
                stacks.append({"params": [copy], "rows": rows_of[id(parameter)]})
                self.masters.append(_Master(parameter, slice(0, len(parameter)), copy))
                self.hooks.append(parameter.register_post_accumulate_grad_hook(_collector(self.masters[-1:])))
                continue
            inside = name.startswith(("layers.", "mtp.")) and ".router." not in name
            by_muon = kind == "muon" and parameter.dim() == 2 and inside and not name.endswith("bias")
            whole = (len(parameter),)
            parts = parts_of.get(id(parameter), whole) if by_muon else whole
            start = 0
            mine = []
            for rows in parts:
                part = slice(start, start + rows)
                copy = nn.Parameter(parameter.detach()[part].float().clone())
                mine.append(_Master(parameter, part, copy))
                (matrices if by_muon else others).append(copy)
                start += rows
            self.masters += mine
            self.hooks.append(parameter.register_post_accumulate_grad_hook(_collector(mine)))
        decayed = [p for p in others if p.dim() > 1]
        plain = [p for p in others if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        # in float32 where bfloat16 would be emulated
        products = next((m.source.dtype for m in self.masters), torch.float32)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.compiled: CompiledAdamW | None = None
        if groups:  # empty when Muon trains only LoRA's matrices
            self.optimizers.append(self._adamw(groups, lr, betas))
        if matrices:
            single = [{"params": [matrix], "rows": len(matrix)} for matrix in matrices]
            self.optimizers.append(Muon(single, lr, weight_decay, products))
        if stacks:
            self.optimizers.append(Muon(stacks, lr, weight_decay, products))

    def _adamw(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """AdamW of these groups: compiled, where it clips and publishes as well, or torch's."""
        mine = {id(copy) for group in groups for copy in group["params"]}
        published = {
            m.copy: (m.source.detach()[m.rows], self.stored == torch.bfloat16)
            for m in self.masters
            if id(m.copy) in mine
        }
        known = (torch.bfloat16, torch.float32)
        as_known = self.stored in (None, *known) and all(out.dtype in known for out, _ in published.values())
        first = self.masters[0].source
        if as_known and all(m.source.is_contiguous() for m in self.masters) and adamw.COMPILED.on(first):
            self.compiled = CompiledAdamW(groups, published, lr=lr, betas=betas, eps=1e-8)
            return self.compiled
        fused = adamw.usable(groups[0]["params"][0])
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)

    def sum_gradients(self, ranks: Ranks) -> None:
        """Sum the accumulated gradients over the ranks; one that only other ranks have counts as zero here."""
        present = torch.tensor([float(not master.fresh) for master in self.masters], device=ranks.device)
        for master, holders in zip(self.masters, ranks.total(present).tolist(), strict=True):
            if holders:
                grad = torch.zeros_like(master.copy) if master.fresh else master.copy.grad
                assert grad is not None
                master.copy.grad, master.fresh = ranks.total(grad.detach()), False

    def clip(self, max_norm: float) -> float:
        """Scale the accumulated gradients down to `max_norm`; returns their norm before."""
        for master in self.masters:
            if master.fresh:
                master.copy.grad = None
        copies = [m.copy for m in self.masters if m.copy.grad is not None]
        if self.compiled is None:
            return float(nn.utils.clip_grad_norm_(copies, max_norm))
        norm = self.compiled.norm([copy.grad for copy in copies if copy.grad is not None])
        factor = min(1.0, max_norm / (norm + 1e-6))
        self.compiled.clip = factor
        for copy in copies:
            if copy not in self.compiled.published and copy.grad is not None:  # Muon's
                copy.grad.mul_(factor)
        return norm

    def step(self, lr: float) -> None:
        """Update with the accumulated gradients, and write the result into the network."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for master in self.masters:
            master.fresh = True
        with torch.no_grad():
            done = self.compiled.published if self.compiled is not None else {}
            self._publish([master for master in self.masters if master.copy not in done])

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the network, rounded to its stored dtype; its version counters advance."""
        self._publish(self.masters)

    def _publish(self, masters: Sequence[_Master]) -> None:
        for master in masters:
            rounded = master.copy if self.stored is None else master.copy.to(self.stored)
            master.source[master.rows].copy_(rounded)

    def state(self) -> dict[str, Tensor]:
        """The state for `restore`, as flat named tensors."""
        out = {f"master.{i}": m.copy.detach() for i, m in enumerate(self.masters)}
        for number, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for key, value in entries.items():
                    out[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore a `state`, including the network."""
        for i, master in enumerate(self.masters):
            master.copy.copy_(tensors[f"master.{i}"])
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, index, key = name.split(".")
                    states.setdefault(int(index), {})[key] = tensor.clone()
            optimizer.load_state_dict(
                {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        self.publish()


class Muon(torch.optim.Optimizer):
    """Muon with Moonlight's scale, for matrices [R, C] and for stacks of them [E, R or more, C].

    Unlike `torch.optim.Muon`, it orthogonalises all matrices of a stack in one batch of products, in the dtype
    `products` (torch's multiplies in bfloat16 on every processor). A group's `rows` is the number of rows of one
    matrix; a stack may hold several on top of each other (gate, up).
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, weight_decay: float, products: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.products = products

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                matrices = parameter.grad.lerp(average, MOMENTUM).view(-1, group["rows"], parameter.shape[-1])
                update = orthogonalised(matrices.to(self.products))
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalised(matrices_BMN: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1, [B, M, N], by five Newton-Schulz steps (Jordan 2024)."""
    x = matrices_BMN
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7).to(x.dtype)
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.transpose(1, 2) if tall else x


def _collector(masters: Sequence[_Master]):  # type: ignore[no-untyped-def]
    """A hook that moves a parameter's gradient into its masters as soon as it is complete."""

    @torch.no_grad()
    def collect(parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        for master in masters:
            if master.copy.grad is None:
                master.copy.grad = grad[master.rows].float().contiguous()
            elif master.fresh:
                master.copy.grad.copy_(grad[master.rows])
            else:
                master.copy.grad.add_(grad[master.rows])
            master.fresh = False

    return collect


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate for step 0..steps-1: linear warm-up over `warmup` steps, then constant, linear to 0, cosine
    to 0, or `wsd`: constant, and linear to 0 over the last fifth of the steps (arXiv:2405.18392)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        return peak * min(1.0, 5 * (steps - step) / steps)
    return peak


def add_lora(decoder: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Freeze the network and give every linear map inside its layers a trainable update of rank `rank`."""
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    for module in decoder.layers.modules():
        if isinstance(module, Linear):
            module.lora = Lora(module, rank, alpha, generator)
