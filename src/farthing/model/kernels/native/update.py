"""AdamW's update (arXiv:1711.05101) with clipping before it and publishing after, in one pass over the weights.

A tensor is cut into chunks of `CHUNK` elements, the items of its operation. `settings` are float64: learning rate, both
betas, epsilon, weight decay, both corrections of the moments' bias, and what clipping multiplies gradients by.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import (
    bfloat16_of,
    fields,
    float32_of,
    read_f32,
    read_f64,
    write_f32,
    write_f64,
    write_i16,
)
from farthing.model.kernels.native.rowwise import sum_of_squares
from farthing.model.kernels.native.sizes import BFLOAT16, CHUNK, FLOAT32, LANES
from farthing.model.kernels.native.vector import (
    F32,
    Vector,
    constant,
    integer,
    load,
    offset,
    primitive,
    splat,
    store,
    to_bfloat16,
    vectors,
    widened,
)


@function
def squares(op: int, item: int) -> None:
    """The sum of the squares of a chunk, float64; chunks are added in order, whoever computed them."""
    _, x, count, sums, _ = fields(op, 5)
    first = item * CHUNK
    length = min(CHUNK, count - first)
    whole = length // LANES * LANES
    total = 0.0
    for start in range(0, whole, CHUNK // 16):  # float32 sums of few terms
        total += sum_of_squares(x + 4 * (first + start), min(CHUNK // 16, whole - start))
    for i in range(first + whole, first + length):
        total += read_f32(x + 4 * i) ** 2
    write_f64(sums + 8 * item, total)


def _stepped(published: str) -> Any:
    """`f(master, gradient, mean, square, out, count, lr, beta1, beta2, eps, decay, correction1, root2, clip)`.

    `out` takes the weight as `published`: float32, bfloat16, or bfloat16's values in float32 (rounded).
    """

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        master, gradient, mean, square, out, count, *numbers = arguments
        lr, beta1, beta2, eps, decay, correction1, root2, clip = (
            Vector(builder, splat(builder, x)) for x in numbers
        )
        one = Vector(builder, constant(F32, 1.0))
        kept = one - lr * decay
        size = lr / correction1

        def body(index: ir.Value) -> None:
            at = builder.mul(index, integer(4))
            w, g, m, v = (
                Vector(builder, load(builder, offset(builder, a, at), F32))
                for a in (master, gradient, mean, square)
            )
            g = g * clip
            m = (g - m).times_plus(one - beta1, m)
            v = (g * g).times_plus(one - beta2, v * beta2)
            w = w * kept - size * m / (v.root() / root2 + eps)
            for value, address in ((w, master), (m, mean), (v, square)):
                store(builder, value.value, offset(builder, address, at))
            if published == "float32":
                store(builder, w.value, offset(builder, out, at))
                return
            short = to_bfloat16(builder, w.value)
            if published == "bfloat16":
                store(builder, short, builder.add(out, builder.mul(index, integer(2))))
            else:
                store(builder, widened(builder, short), offset(builder, out, at))

        vectors(builder, count, body)
        return context.get_dummy_value()

    kinds = [types.int64] * 6 + [types.float32] * 8
    return primitive(f"stepped_{published}", types.void, kinds, generated)


stepped_float32, stepped_bfloat16, stepped_rounded = map(_stepped, ("float32", "bfloat16", "rounded"))


@function
def adamw(op: int, item: int) -> None:
    """Update a chunk of a master weight and its moments, and publish it into the network's parameter."""
    _, master, gradient, mean, square, out, published, count, settings, _ = fields(op, 10)
    lr, beta1, beta2, eps = (
        read_f64(settings),
        read_f64(settings + 8),
        read_f64(settings + 16),
        read_f64(settings + 24),
    )
    decay, correction1, correction2 = (
        read_f64(settings + 32),
        read_f64(settings + 40),
        read_f64(settings + 48),
    )
    clip, root2 = read_f64(settings + 56), correction2**0.5
    first = item * CHUNK
    length = min(CHUNK, count - first)
    whole = length // LANES * LANES
    w, g, m, v = master + 4 * first, gradient + 4 * first, mean + 4 * first, square + 4 * first
    target = out + (2 if published == BFLOAT16 else 4) * first
    if published == FLOAT32:
        stepped_float32(w, g, m, v, target, whole, lr, beta1, beta2, eps, decay, correction1, root2, clip)
    elif published == BFLOAT16:
        stepped_bfloat16(w, g, m, v, target, whole, lr, beta1, beta2, eps, decay, correction1, root2, clip)
    else:
        stepped_rounded(w, g, m, v, target, whole, lr, beta1, beta2, eps, decay, correction1, root2, clip)
    for i in range(whole, length):
        gi = read_f32(g + 4 * i) * clip
        mi = read_f32(m + 4 * i) + (gi - read_f32(m + 4 * i)) * (1.0 - beta1)
        vi = read_f32(v + 4 * i) * beta2 + gi * gi * (1.0 - beta2)
        wi = read_f32(w + 4 * i) * (1.0 - lr * decay) - lr / correction1 * mi / (vi**0.5 / root2 + eps)
        write_f32(m + 4 * i, mi)
        write_f32(v + 4 * i, vi)
        write_f32(w + 4 * i, wi)
        if published == FLOAT32:
            write_f32(target + 4 * i, wi)
        elif published == BFLOAT16:
            write_i16(target + 2 * i, bfloat16_of(wi))
        else:
            write_f32(target + 4 * i, float32_of(bfloat16_of(wi)))
