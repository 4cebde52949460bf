"""Weights of 8 or 4 bits for answering: rounded in place, so that every pass through the network uses the same ones.

int8 has a scale for each 32 inputs of an output (as GGUF's Q8_0), int4 a scale and a minimum (as Q4_1), in float16.
Matrices inside the layers and the head are rounded, the head and a tied embedding to int8 in either case; norms,
biases, routers and the latents' projection are not. Compiled decoding packs the rounded weights
(`model.kernels.native.pack`); prompts are read with the same values in the network's dtype.
"""

from __future__ import annotations

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.limits import shortened
from farthing.model import Decoder
from farthing.model.kernels.native.sizes import GROUP
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear
from farthing.model.moe import Experts

CHOICES = ("exact", "int8", "int4")
_MEANT = {
    "8": "int8",
    "q8": "int8",
    "q8_0": "int8",
    "4": "int4",
    "q4": "int4",
    "q4_1": "int4",
    "q4_0": "int4",
}


def check(name: str) -> str:
    """Return `name` if weights can be rounded to it. Raises UserError with the nearest name otherwise."""
    if name not in CHOICES:
        near = (
            [_MEANT[name.lower()]] if name.lower() in _MEANT else difflib.get_close_matches(name, CHOICES, 1)
        )
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"quantize: must be exact, int8 or int4, got {shortened(name)!r}{hint}")
    return name


@torch.no_grad()
def quantize_(decoder: Decoder, name: str) -> None:
    """Round a decoder's matrices in place."""
    if name == "exact":
        return
    kept = {id(module.kv_b) for module in decoder.modules() if isinstance(module, LatentAttention)}
    for part in (decoder.layers, decoder.mtp):
        for module in part.modules():
            if isinstance(module, Linear) and id(module) not in kept:
                module.weight.copy_(rounded(module.weight, name))
            elif isinstance(module, Experts):
                for weight in (module.gate_up, module.down):
                    weight.copy_(rounded(weight, name))
    decoder.head.weight.copy_(rounded(decoder.head.weight, "int8"))


def rounded(weight: Tensor, name: str) -> Tensor:
    """The nearest values that a weight [..., inputs] can have in int8 or int4, float32."""
    inputs = weight.shape[-1]
    groups = F.pad(weight.float(), (0, -inputs % GROUP)).unflatten(-1, (-1, GROUP))
    if name == "int8":
        minimum = torch.zeros(())
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
        low, high = -127, 127
    else:
        minimum = groups.amin(-1, keepdim=True)
        scale = ((groups.amax(-1, keepdim=True) - minimum) / 15).half().float()
        minimum, low, high = minimum.half().float(), 0, 15
    steps = torch.where(scale > 0, (groups - minimum) * (1.0 / scale), 0.0)
    return ((steps + 0.5).floor().clamp(low, high) * scale + minimum).flatten(-2)[..., :inputs]
