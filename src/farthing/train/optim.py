"""Optimizers over float32 master weights, whatever the network computes in.

A bfloat16 weight of 0.05 cannot take a step smaller than 2e-4, which is more than most steps are. So the
optimizer works on float32 copies, gradients are summed into them as they arrive, and the network is rewritten
after each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farthing.model.layers import Linear


@dataclass
class _Master:
    """Rows of one network parameter and the float32 copy that is optimized in their place."""

    source: nn.Parameter
    rows: slice
    copy: nn.Parameter
    fresh: bool = True  # no gradient has come in since the last step; the buffer holds an old one


class MasterWeights:
    """The trainable parameters of a network, in float32, under AdamW or Muon.

    Args:
        kind: `adamw` (Loshchilov and Hutter, arXiv:1711.05101) for everything, or `muon` (Jordan 2024; with
            Moonlight's update scale 0.2 sqrt(max(rows, columns)), arXiv:2502.16982 section 2.2) for the
            matrices inside the layers and AdamW for embedding, head, norms and biases. Matrices that the
            network fuses are optimized apart.
    """

    def __init__(
        self, network: nn.Module, kind: str, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.masters: list[_Master] = []
        self.hooks = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        parts_of = {
            id(module.weight): module.parts for module in network.modules() if isinstance(module, Linear)
        }
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            by_muon = kind == "muon" and parameter.dim() == 2 and ".layers." in f".{name}"
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
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups:  # there are none when Muon trains LoRA's matrices alone
            self.optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True))
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
                )
            )

    def clip(self, max_norm: float) -> float:
        """Scale the gradients gathered since the last step down to `max_norm`; returns their norm before."""
        for master in self.masters:
            if master.fresh:
                master.copy.grad = None
        copies = [m.copy for m in self.masters if m.copy.grad is not None]
        return float(nn.utils.clip_grad_norm_(copies, max_norm))

    def step(self, lr: float) -> None:
        """One update with the gathered gradients, written through to the network."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for master in self.masters:
            master.fresh = True
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the network, rounded to its dtype; its version counters advance."""
        for master in self.masters:
            master.source[master.rows].copy_(master.copy)

    def state(self) -> dict[str, Tensor]:
        """Everything a later `restore` needs, as flat named tensors."""
        out = {f"master.{i}": m.copy.detach() for i, m in enumerate(self.masters)}
        for number, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for key, value in entries.items():
                    out[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state`, network included."""
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


def _collector(masters: Sequence[_Master]):  # type: ignore[no-untyped-def]
    """A hook that moves a parameter's gradient into its masters as soon as it is complete."""

    @torch.no_grad()
    def collect(parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        for master in masters:
            if master.copy.grad is None:
                master.copy.grad = grad[master.rows].float()
            elif master.fresh:
                master.copy.grad.copy_(grad[master.rows])
            else:
                master.copy.grad.add_(grad[master.rows])
            master.fresh = False

    return collect


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate for step 0..steps-1: linear warm-up over `warmup` steps, then constant, linear to 0 or cosine
    to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
