"""Token loss from the last hidden state and the head, in one operation of torch 2.13 and later.

Shapes: M tokens, C model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, numbers


def fused(hidden_MC: Tensor, head_VC: Tensor, targets_M: Tensor) -> Tensor:
    """Return -log p(target), [M] nats; saves the logits for the backward pass."""
    losses_M: Tensor = F.linear_cross_entropy(hidden_MC, head_VC, targets_M, reduction="none")
    return losses_M


def _reference(hidden_MC: Tensor, head_VC: Tensor, targets_M: Tensor) -> Tensor:
    return F.cross_entropy((hidden_MC @ head_VC.T).float(), targets_M, reduction="none")


def _lacks(device: torch.device, dtype: torch.dtype) -> str:
    return "" if hasattr(F, "linear_cross_entropy") else "this torch has no linear_cross_entropy (2.13 does)"


def _examples() -> list[tuple[Tensor, Tensor, Tensor]]:
    targets_M = torch.tensor([0, 36, 5, 7, 5])
    return [(numbers(5, 16).requires_grad_(), numbers(37, 16, seed=1).requires_grad_(), targets_M)]


KERNEL = Kernel("cross-entropy", "torch's fused loss and head", fused, _reference, _lacks, _examples)
