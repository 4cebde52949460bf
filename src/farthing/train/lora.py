"""Training a low-rank update instead of the weights (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import torch

from farthing.model import Decoder
from farthing.model.layers import Linear, Lora


def add_lora(decoder: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Freeze the network and give every linear map inside its layers a trainable update of rank `rank`."""
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    for module in decoder.layers.modules():
        if isinstance(module, Linear):
            module.lora = Lora(module, rank, alpha, generator)
