"""Rotary position embedding: rotates the pairs (i, i + D/2) of a head by position * frequency_i.

Where only a part of each head rotates, the last pairs have frequency 0; adapters order a head's rows so.

Shapes: T positions, N tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.config import Rope

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the rotation speeds in radians per position, [D/2] float32 (arXiv:2104.09864 section 3.2.2; Llama 3.1 for
    `llama3`, arXiv:2309.00071 section 3.2 for `yarn`, arXiv:2402.13753 for `longrope`).

    Raises:
        ValueError: for an unknown scaling kind.
    """
    rotated = int(head_dim * rope.share)
    return F.pad(_speeds(rope, rotated), (0, (head_dim - rotated) // 2))


def _speeds(rope: Rope, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    freq = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "longrope":
        return freq / torch.tensor(rope.divisors)
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        turns = rope.original_max_positions / wavelength
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = ramp.clamp(0, 1)  # 0: slow pair, divided by factor; 1: fast pair, kept
        return freq * (keep + (1 - keep) / rope.factor)
    if rope.kind == "yarn":
        # Keep pairs that turn more than beta_fast times in the original context, divide those that turn less than
        # beta_slow times by factor, and ramp linearly between the two pair numbers.
        def pair_turning(times: float) -> float:
            wavelength = rope.original_max_positions / (times * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

        first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        stretch = ((torch.arange(head_dim // 2) - first) / (last - first or 0.001)).clamp(0, 1)
        return freq * (1 - stretch + stretch / rope.factor)
    raise ValueError(f"rope scaling {rope.kind!r} is not supported; use one of {', '.join(KINDS)}")


def tables(rope: Rope, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) for positions 0..length-1, each [T, D] float32.

    The first half of sin is negated, so `rotate` computes x * cos + swap_halves(x) * sin.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(rope, head_dim))
    scale = torch.full((head_dim // 2,), rope.table_scale)
    scale[int(head_dim * rope.share) // 2 :] = 1.0  # pairs that never rotate
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotated(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    return torch.addcmul(x_NHD * cos_N1D, x_NHD.roll(x_NHD.shape[-1] // 2, -1), sin_N1D)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle, so only the tables are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotate x by its tokens' positions, [N, H, D] -> [N, H, D]; the tables have x's dtype."""
    if torch.is_grad_enabled():
        return _Rotate.apply(x_NHD, cos_N1D, sin_N1D)
    return _rotated(x_NHD, cos_N1D, sin_N1D)
