"""What happens to each row between products: embedding, RMSNorm, rotation, quantization, SwiGLU's middle.

Rows are float32. Each operation reads its fields (`codes.FIELDS`) and works on one item: a row.
"""

from __future__ import annotations

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import (
    as_float,
    bfloat16_of,
    fields,
    float32_of,
    read_f32,
    read_i16,
    read_i64,
    write_f32,
    write_i16,
)
from farthing.model.kernels.native.sizes import GROUP, LANES
from farthing.model.kernels.native.vector import Vector, elementwise, reduction

INT16 = 32000.0  # what a row's largest element becomes; room for rounding below 2^15


@elementwise(1)
def copied(x: Vector) -> Vector:
    return x


@elementwise(1, reads="bfloat16")
def widened_rows(x: Vector) -> Vector:
    return x


@elementwise(1, 1)
def scaled(x: Vector, factor: Vector) -> Vector:
    return x * factor


@elementwise(2)
def added(x: Vector, y: Vector) -> Vector:
    return x + y


@elementwise(2, 1)
def plus_scaled(x: Vector, y: Vector, factor: Vector) -> Vector:
    return y.times_plus(factor, x)


@elementwise(2, 1)
def normed(x: Vector, weight: Vector, factor: Vector) -> Vector:
    return x * factor * weight


@elementwise(3, 1)
def normed_and_added(x: Vector, weight: Vector, before: Vector, factor: Vector) -> Vector:
    return x * factor * weight + before


@elementwise(2)
def silu_product(gate: Vector, up: Vector) -> Vector:
    return gate.silu() * up


@elementwise(2)
def gelu_product(gate: Vector, up: Vector) -> Vector:
    return gate.gelu() * up


@elementwise(1, 1)
def capped(x: Vector, cap: Vector) -> Vector:
    return (x / cap).tanh() * cap


@reduction(1)
def sum_of_squares(x: Vector) -> Vector:
    return x * x


@reduction(1, by="max")
def largest_magnitude(x: Vector) -> Vector:
    return x.absolute()


@reduction(1, by="max")
def largest(x: Vector) -> Vector:
    return x


@function
def embed(op: int, row: int, ids: int, table: int) -> None:
    """out[row] = scale * table[ids[row]]."""
    _, stored, width, scale, out, pitch = fields(op, 6)
    source = table + read_i64(ids + 8 * row) * width * stored
    target = out + row * pitch
    whole = width // LANES * LANES
    if stored == 2:
        widened_rows(target, source, whole)
        for i in range(whole, width):
            write_f32(target + 4 * i, float32_of(read_i16(source + 2 * i)))
    else:
        copied(target, source, whole)
        for i in range(whole, width):
            write_f32(target + 4 * i, read_f32(source + 4 * i))
    factor = as_float(scale)
    if factor != 1.0:
        scaled(target, target, factor, width)


@function
def norm(op: int, row: int) -> None:
    """RMSNorm of `groups` parts of a row, `step` bytes apart: `width` elements each, in `length` places of which the
    others hold zeros (arXiv:1910.07467). Adds the row at `plus` if there is one. Weights are float32."""
    _, x, pitch, groups, step, length, width, weight, eps, plus, out, out_pitch, out_step = fields(op, 13)
    for group in range(groups):
        source = x + row * pitch + group * step
        target = out + row * out_pitch + group * out_step
        mean = sum_of_squares(source, length) / width
        factor = 1.0 / (mean + as_float(eps)) ** 0.5
        if plus:
            normed_and_added(
                target, source, weight, plus + row * out_pitch + group * out_step, factor, length
            )
        else:
            normed(target, source, weight, factor, length)


@function
def quantize(op: int, row: int) -> None:
    """A float32 row as int16, its groups' sums and its scale: what `products` reads for int8 and int4 weights."""
    _, x, pitch, width, out, out_pitch, _ = fields(op, 7)
    source, target = x + row * pitch, out + row * out_pitch
    most = largest_magnitude(source, width)
    factor = INT16 / max(most, 1e-30)
    sums = target + 2 * width
    for group in range(width // GROUP):
        total = 0
        for i in range(GROUP * group, GROUP * (group + 1)):
            value = round_half_up(read_f32(source + 4 * i) * factor)
            write_i16(target + 2 * i, value)
            total += value
        write_f32(sums + 4 * group, total)
    write_f32(sums + 4 * (width // GROUP), 1.0 / factor)


@function
def round_half_up(x: float) -> int:
    return int(x + 32768.5) - 32768  # without the branches of rounding half to even


@function
def cap(op: int, row: int) -> None:
    """x = cap * tanh(x / cap), in place (Gemma 2, arXiv:2408.00118 section 2)."""
    _, x, pitch, width, bound = fields(op, 5)
    capped(x + row * pitch, x + row * pitch, as_float(bound), width)


@function
def rotate_head(head: int, half: int, cos: int, sin: int) -> None:
    """Rotate the pairs (i, i + half) of one head in place. Tables hold float32 of one position, [half]."""
    for i in range(half):
        a, b = read_f32(head + 4 * i), read_f32(head + 4 * (half + i))
        c, s = read_f32(cos + 4 * i), read_f32(sin + 4 * i)
        write_f32(head + 4 * i, a * c - b * s)
        write_f32(head + 4 * (half + i), b * c + a * s)


@function
def store_value(address: int, stored_bytes: int, value: float) -> None:
    """Store in the cache's dtype, bfloat16 or float32."""
    if stored_bytes == 2:
        write_i16(address, bfloat16_of(value))
    else:
        write_f32(address, value)


@function
def rotate(op: int, row: int, positions: int, pages: int) -> None:
    """Rotate a row's queries and keys, and store its keys and values in its page.

    Keys lie [page][head][element][token] and values [page][head][element / 16][token][16]: what attention reads with
    whole vectors.
    """
    _, x, pitch, heads, groups, width, padded, cos, sin, keys, values, stored = fields(op, 12)
    position, half = read_i64(positions + 8 * row), width // 2
    c, s = cos + 4 * half * position, sin + 4 * half * position
    start = x + row * pitch
    for head in range(heads):
        rotate_head(start + 4 * head * padded, half, c, s)
    page, token = read_i64(pages + 8 * row), position % LANES
    for group in range(groups):
        key = start + 4 * (heads + group) * padded
        value = key + 4 * groups * padded
        rotate_head(key, half, c, s)
        base = (page * groups + group) * padded * LANES
        for i in range(width):
            store_value(keys + stored * (base + i * LANES + token), stored, read_f32(key + 4 * i))
        for i in range(width):
            place = base + (i // LANES * LANES + token) * LANES + i % LANES
            store_value(values + stored * place, stored, read_f32(value + 4 * i))


@function
def rotate_latent(op: int, row: int, positions: int, pages: int) -> None:
    """Rotate the last `width` elements of a row's queries, into the absorbed queries, and its shared key; store latent
    and key as one entry of the row's page, [token][element] (arXiv:2405.04434 section 2.1)."""
    (_, q, q_pitch, q_step, heads, width, cos, sin, absorbed, absorbed_pitch, absorbed_step, latent, key, kv_pitch,
     latent_width, entries, entry_width, stored) = fields(op, 18)  # fmt: skip
    position, half = read_i64(positions + 8 * row), width // 2
    c, s = cos + 4 * half * position, sin + 4 * half * position
    for head in range(heads):
        source = q + row * q_pitch + head * q_step
        target = absorbed + row * absorbed_pitch + head * absorbed_step
        rotate_head(source, half, c, s)
        for i in range(width):
            write_f32(target + 4 * i, read_f32(source + 4 * i))
    own = key + row * kv_pitch
    rotate_head(own, half, c, s)
    place = entries + stored * (read_i64(pages + 8 * row) * LANES + position % LANES) * entry_width
    source = latent + row * kv_pitch
    for i in range(latent_width):
        store_value(place + stored * i, stored, read_f32(source + 4 * i))
    for i in range(width):
        store_value(place + stored * (latent_width + i), stored, read_f32(own + 4 * i))
