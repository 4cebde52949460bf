"""Quantise to Q4_K, the four-bit blocks of a .gguf: gguf's own Python has only the way back.

A super-block is 256 weights of one row in 144 bytes: a float16 step for scales and one for minimums, eight 6-bit scales
and minimums, and 256 four-bit numbers. Sub-block s of 32 weights means d * scale_s * q - dmin * minimum_s.
(The format: ggml's ggml-common.h, block_q4_K.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SUPER, SUB, BYTES = 256, 32, 144
_SUBS = SUPER // SUB
_TOP, _SIX_BITS = 15, 63
# The range is cut into so many steps at first: above 15 the ends are clipped, which pays where one weight lies far out.
_STEPS = (14.5, 15.0, 15.5, 16.0, 16.5, 17.0, 18.0, 19.0)
_PIECE = 256  # super-blocks at a time: their arrays stay in a processor's cache


def quantise_q4_k(rows: Array) -> Array:
    """The rows' bytes in the file, [R, C / 256 * 144] uint8.

    Scales and minimums are chosen to minimise the squared error, where an error counts more the larger its weight is.

    Args:
        rows: [R, C] float32, finite, below 65504 in size; C is a multiple of 256.
    """
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, _SUBS, SUB)
    out = np.empty((len(blocks), BYTES), dtype=np.uint8)
    for start in range(0, len(blocks), _PIECE):
        out[start : start + _PIECE] = _packed(*_chosen(blocks[start : start + _PIECE]))
    return out.reshape(len(rows), -1)


def _chosen(x: Array) -> tuple[Array, Array, Array, Array]:
    """(steps [N, 2] float16, scales [N, 8] and minimums [N, 8] uint8, numbers [N, 8, 32] uint8) for x [N, 8, 32]."""
    weights = np.abs(x) + np.sqrt((x * x).mean(axis=2, keepdims=True))
    scales, minimums = _fitted(x, weights)
    steps, codes = [], []
    for wanted in (scales, minimums):
        step = (wanted.max(axis=1, keepdims=True) / _SIX_BITS).astype(np.float16)
        steps.append(step)
        codes.append(np.rint(np.clip(wanted * _inverse(step), 0, _SIX_BITS)))
    numbers = _numbers(x, steps[0] * codes[0], steps[1] * codes[1])
    steps = _refitted(x, weights, codes, numbers, steps)
    found = [steps[0] * codes[0], steps[1] * codes[1]]
    numbers = _numbers(x, *found)
    # beside much larger ones, or below float16's smallest steps, a sub-block may be further off than all zeros are
    read = found[0][..., None] * numbers - found[1][..., None]
    worse = (weights * (read - x) ** 2).sum(axis=2) > (weights * x * x).sum(axis=2)
    for codes_of in codes:
        codes_of[worse] = 0
    both = np.concatenate(steps, axis=1)
    return both, codes[0].astype(np.uint8), codes[1].astype(np.uint8), numbers.astype(np.uint8)


def _fitted(x: Array, weights: Array) -> tuple[Array, Array]:
    """Scale and minimum of each sub-block, [N, 8] float32: the best of what each of `_STEPS` leads to.

    Given the numbers, the best scale and minimum follow from a line through the points by weighted least squares.
    """
    low = np.minimum(x.min(axis=2), 0)
    span = x.max(axis=2) - low
    above = x - low[..., None]
    sum_w, sum_wx = weights.sum(axis=2), np.einsum("nsi,nsi->ns", weights, x)
    best = np.full(span.shape, np.inf, dtype=np.float32)
    scales, minimums = np.zeros_like(span), -low
    for steps in _STEPS:
        q = np.rint(np.minimum(above * _inverse(span / steps)[..., None], _TOP))
        wq = weights * q
        sum_wq = wq.sum(axis=2)
        sum_wqq, sum_wqx = np.einsum("nsi,nsi->ns", wq, q), np.einsum("nsi,nsi->ns", wq, x)
        scale = (sum_w * sum_wqx - sum_wx * sum_wq) * _inverse(sum_w * sum_wqq - sum_wq * sum_wq)
        offset = (sum_wx - scale * sum_wq) * _inverse(sum_w)
        above_zero = offset > 0  # a minimum is taken away, never added
        scale = np.where(above_zero, sum_wqx * _inverse(sum_wqq), scale)
        offset = np.where(above_zero, 0, offset)
        # the squared error less the sum of w x^2, which is the same for all
        error = scale * (scale * sum_wqq - 2 * sum_wqx) + offset * (
            offset * sum_w - 2 * sum_wx + 2 * scale * sum_wq
        )
        better = (error < best) & (scale >= 0)
        best = np.where(better, error, best)
        scales, minimums = np.where(better, scale, scales), np.where(better, -offset, minimums)
    return scales, minimums


def _refitted(
    x: Array, weights: Array, codes: list[Array], numbers: Array, steps: list[Array]
) -> list[Array]:
    """The two steps of each super-block, [N, 1] float16, that are best for the codes and numbers chosen."""
    scaled, taken = codes[0][..., None] * numbers, -codes[1]
    w_scaled = weights * scaled
    aa = np.einsum("nsi,nsi->n", w_scaled, scaled)
    ab = np.einsum("ns,ns->n", w_scaled.sum(axis=2), taken)
    bb = np.einsum("ns,ns->n", weights.sum(axis=2), taken * taken)
    ax = np.einsum("nsi,nsi->n", w_scaled, x)
    bx = np.einsum("ns,ns->n", np.einsum("nsi,nsi->ns", weights, x), taken)
    inverse = _inverse(aa * bb - ab * ab)
    found = [(ax * bb - bx * ab) * inverse, (bx * aa - ax * ab) * inverse]
    alone = ax * _inverse(aa)  # without any minimum there is one step to find
    usable = (inverse > 0) & (found[0] > 0) & (found[1] > 0)
    first = np.where(usable, found[0], np.where(bb == 0, alone, steps[0][:, 0]))
    second = np.where(usable, found[1], steps[1][:, 0])
    return [first.astype(np.float16)[:, None], second.astype(np.float16)[:, None]]


def _numbers(x: Array, scales: Array, minimums: Array) -> Array:
    """The nearest of the 16 numbers for each weight, as float32."""
    q: Array = np.rint((x + minimums[..., None]) * _inverse(scales)[..., None])
    return np.clip(q, 0, _TOP, out=q)


def _inverse(values: Array) -> Array:
    """1 / values in float32, and 0 where that is none: nothing is there to be divided."""
    values = values.astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / values
    return np.where(np.isfinite(found), found, np.float32(0))


def _packed(steps: Array, scales: Array, minimums: Array, numbers: Array) -> Array:
    """[N, 144] uint8. Scales and minimums 4 to 7 lie in four bits of their own and the two spare ones of 0 to 3."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minimums[:, :4] | (minimums[:, 4:] >> 4 << 6)
    rest = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    pairs = numbers.reshape(-1, _SUBS // 2, 2, SUB)  # two sub-blocks share 32 bytes
    nibbles = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    return np.concatenate(
        [np.ascontiguousarray(steps).view(np.uint8), first, second, rest, nibbles.reshape(-1, SUPER // 2)],
        axis=1,
    )
