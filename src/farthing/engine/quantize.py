"""Weights of 8 or 4 bits for answering: rounded in place, so that every pass through the network uses the same ones.

int8 has a scale for each 32 inputs of an output (as GGUF's Q8_0), int4 a scale and a minimum (as Q4_1), in float16.
Matrices inside the layers and the head are rounded, the head and a tied embedding to int8 in either case; norms and
biases are not; routers and the latents' projection are kept in bfloat16. Compiled decoding packs the rounded weights
(`model.kernels.native.pack`); prompts are read with the same values in the network's dtype.
"""

from __future__ import annotations

import difflib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.limits import shortened
from farthing.engine.builder import places_of_both, places_of_heads
from farthing.model import Decoder
from farthing.model.attention import GroupedQueryAttention
from farthing.model.kernels.native.sizes import GROUP
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear
from farthing.model.moe import Experts, Router
from farthing.model.mtp import MultiTokenPredictor

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
    """Round a decoder's matrices in place.

    Raises:
        UserError: if one has values that are not finite, or too large for the scales.
    """
    if name == "exact":
        return
    kept = {module.kv_b for module in decoder.modules() if isinstance(module, LatentAttention)}
    places = _places(decoder)
    for part in (decoder.layers, decoder.mtp):
        for module in part.modules():
            if module in kept or isinstance(module, Router):
                module.weight.copy_(module.weight.bfloat16())
            elif isinstance(module, Linear):
                _round(module.weight, name, places.get(module))
            elif isinstance(module, Experts):
                for weight in (module.gate_up, module.down):
                    _round(weight, name)
    _round(decoder.head.weight, "int8")


def _round(weight: Tensor, name: str, places: np.ndarray | None = None) -> None:
    found = rounded(weight, name, places)
    if not found.isfinite().all():
        size = " x ".join(map(str, weight.shape))
        raise UserError(
            f"quantize: a weight of {size} is not finite or too large for {name}; answer with exact weights"
        )
    weight.copy_(found)


def _places(decoder: Decoder) -> dict[Linear, np.ndarray]:
    """Which input stands in each place of the packed weights that have gaps."""
    found = {}
    for module in decoder.modules():
        if isinstance(module, GroupedQueryAttention | LatentAttention):
            found[module.o] = places_of_heads(module)
        elif isinstance(module, MultiTokenPredictor):
            found[module.join] = places_of_both(decoder.config.hidden_size)
    return {linear: places for linear, places in found.items() if (places < 0).any()}


def rounded(weight: Tensor, name: str, places: np.ndarray | None = None) -> Tensor:
    """The nearest values that a weight [..., inputs] can have in int8 or int4, float32.

    Args:
        places: which input stands in each place of the packed weight, -1 for none, if not all side by side; 32 places
            have a scale.
    """
    if places is not None:
        packed = rounded(F.pad(weight, (0, 1))[..., places], name)  # -1 takes the zero behind the last input
        return packed[..., np.flatnonzero(places >= 0)]
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
