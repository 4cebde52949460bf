"""From logits to a token, its log-probability and the entropy: `engine.sampling.choose`, in two passes over a row.

The first pass leaves exp(logit - largest) in the row and its sum by blocks; the second walks to the token that the
uniform number falls on.
"""

from __future__ import annotations

import math

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import fields, read_f32, read_f64, write_f32, write_f64, write_i64
from farthing.model.kernels.native.rowwise import largest, scaled
from farthing.model.kernels.native.sizes import BLOCK
from farthing.model.kernels.native.vector import Vector, elementwise, reduction


@elementwise(1, 1)
def shifted(x: Vector, most: Vector) -> Vector:
    return x - most


@elementwise(1)
def exponential(x: Vector) -> Vector:
    return x.exp()


@reduction(1)
def plain_sum(x: Vector) -> Vector:
    return x


@reduction(2)
def dot(x: Vector, y: Vector) -> Vector:
    return x * y


@function
def draw(
    op: int, row: int, temperatures: int, uniforms: int, ids: int, logprobs: int, entropies: int, scratch: int
) -> None:
    """Draw a row's token. A temperature of 0 takes the likeliest and scores it at 1; a negative one leaves the row.

    `scratch` takes a block, and the sum of every block.
    """
    _, logits, pitch, entries, padded = fields(op, 5)
    temperature = read_f32(temperatures + 4 * row)
    if temperature < 0.0:
        return
    x = logits + row * pitch
    if temperature not in (0.0, 1.0):
        scaled(x, x, 1.0 / temperature, padded)
    for i in range(entries, padded):
        write_f32(x + 4 * i, -1e30)
    most = largest(x, padded)
    shifted(x, x, most, padded)
    block, sums = scratch, scratch + 4 * BLOCK
    total, weighted = 0.0, 0.0
    for start in range(0, padded, BLOCK):
        count = min(BLOCK, padded - start)
        exponential(block, x + 4 * start, count)
        here = plain_sum(block, count)
        weighted += dot(block, x + 4 * start, count)
        write_f64(sums + 8 * (start // BLOCK), here)
        total += here
    chosen = 0
    if temperature == 0.0:
        while chosen < entries - 1 and read_f32(x + 4 * chosen) < 0.0:
            chosen += 1
    else:
        target = read_f64(uniforms + 8 * row) * total
        blocks, number, before = (padded + BLOCK - 1) // BLOCK, 0, 0.0
        while number < blocks - 1 and before + read_f64(sums + 8 * number) <= target:
            before += read_f64(sums + 8 * number)
            number += 1
        start = number * BLOCK
        count = min(BLOCK, entries - start)
        exponential(block, x + 4 * start, min(BLOCK, padded - start))
        chosen = start
        for i in range(count):  # the last entry with any weight, if rounding leaves the target beyond all
            weight = read_f32(block + 4 * i)
            if weight > 0.0:
                chosen = start + i
                before += weight
                if before > target:
                    break
    write_i64(ids + 8 * row, chosen)
    write_f32(logprobs + 4 * row, read_f32(x + 4 * chosen) - math.log(total))
    write_f32(entropies + 4 * row, math.log(total) - weighted / total)
