"""Attention over the paged cache (Kwon et al., arXiv:2309.06180) for new tokens, one row each.

A sequence's context is cut into spans, so that many threads share a long one (Dao et al., Flash-Decoding 2023): each
item is a row, a key/value head and a span. It leaves an unnormalized sum, its largest score and its sum of weights;
whoever finishes a head's last span merges them. Queries of the heads that share a key/value head are rows of one small
product.

A page holds 16 tokens, one vector: keys lie [head][element][token], values [head][element / 16][token][16]. Latent
attention has one entry a token that all heads share, [token][element], as key and as value (arXiv:2405.04434 section
2.1).
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import (
    as_float,
    atomic_add,
    fields,
    publish,
    read_f32,
    read_i64,
    write_f32,
)
from farthing.model.kernels.native.rowwise import capped, largest, plus_scaled, scaled
from farthing.model.kernels.native.sizes import HEADS, LANES, SPAN
from farthing.model.kernels.native.vector import (
    F32,
    I16,
    I64,
    Vector,
    constant,
    fma,
    integer,
    load,
    offset,
    pointer,
    prefetch,
    primitive,
    reduction,
    splat,
    store,
    vectors,
    widened,
)

HIDDEN = -1e30  # score of a token that is not seen


@reduction(1, 1, keeps=True)
def weights_of(score: Vector, most: Vector) -> Vector:
    return (score - most).exp()


def _scores(heads: int, stored: ir.Type) -> Any:
    """`f(q, pitch, table, first, count, base, page_bytes, width, out, out_pitch)`: scores of `heads` queries with the
    keys of `count` pages, from entry `first` of the table of pages."""
    size = 2 if stored is I16 else 4

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        q, pitch, table, first, count, base, page_bytes, width, out, out_pitch = arguments
        rows = [builder.add(q, builder.mul(pitch, integer(m))) for m in range(heads)]
        outs = [builder.add(out, builder.mul(out_pitch, integer(m))) for m in range(heads)]
        sums = [
            [cgutils.alloca_once(builder, ir.VectorType(F32, LANES)) for _ in range(2)] for _ in range(heads)
        ]
        with cgutils.for_range_slice(builder, integer(0), count, integer(1), I64) as (number, _):
            keys = _page(builder, table, builder.add(first, number), base, page_bytes)
            coming = _page(builder, table, _next(builder, first, number, count), base, page_bytes)
            for pair in sums:
                for slot in pair:
                    builder.store(constant(F32, 0.0), slot)
            with cgutils.for_range_slice(builder, integer(0), width, integer(2), I64) as (d, _):
                prefetch(builder, offset(builder, coming, builder.mul(d, integer(LANES * size))))
                for u in range(2):
                    at = offset(builder, keys, builder.mul(d, integer(LANES * size)), u * LANES * size)
                    key = widened(builder, load(builder, at, stored))
                    for m, row in enumerate(rows):
                        element = offset(builder, row, builder.mul(d, integer(4)), 4 * u)
                        value = splat(builder, builder.load(pointer(builder, element, F32), align=4))
                        builder.store(fma(builder, value, key, builder.load(sums[m][u])), sums[m][u])
            for m, (even, odd) in enumerate(sums):
                total = builder.fadd(builder.load(even), builder.load(odd))
                store(builder, total, offset(builder, outs[m], builder.mul(number, integer(4 * LANES))))
        return context.get_dummy_value()

    return primitive(f"scores_{heads}_{size}", types.void, [types.int64] * 10, generated)


def _sums(heads: int, stored: ir.Type) -> Any:
    """`f(weights, pitch, table, first, count, base, page_bytes, token_bytes, out, out_pitch)`: 16 elements of the sum
    of values times weights. `base` is those elements' place in page 0, tokens `token_bytes` apart."""
    size = 2 if stored is I16 else 4

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        weights, pitch, table, first, count, base, page_bytes, token_bytes, out, out_pitch = arguments
        rows = [builder.add(weights, builder.mul(pitch, integer(m))) for m in range(heads)]
        sums = [
            [cgutils.alloca_once(builder, ir.VectorType(F32, LANES)) for _ in range(2)] for _ in range(heads)
        ]
        for pair in sums:
            for slot in pair:
                builder.store(constant(F32, 0.0), slot)
        with cgutils.for_range_slice(builder, integer(0), count, integer(1), I64) as (number, _):
            values = _page(builder, table, builder.add(first, number), base, page_bytes)
            coming = _page(builder, table, _next(builder, first, number, count), base, page_bytes)
            for token in range(LANES):
                at = builder.add(values, builder.mul(token_bytes, integer(token)))
                if token % (4 // size) == 0:
                    prefetch(builder, builder.add(coming, builder.mul(token_bytes, integer(token))))
                value = widened(builder, load(builder, at, stored))
                for m, row in enumerate(rows):
                    place = offset(builder, row, builder.mul(number, integer(4 * LANES)), 4 * token)
                    weight = splat(builder, builder.load(pointer(builder, place, F32), align=4))
                    slot = sums[m][token % 2]
                    builder.store(fma(builder, weight, value, builder.load(slot)), slot)
        for m, (even, odd) in enumerate(sums):
            total = builder.fadd(builder.load(even), builder.load(odd))
            store(builder, total, builder.add(out, builder.mul(out_pitch, integer(m))))
        return context.get_dummy_value()

    return primitive(f"sums_{heads}_{size}", types.void, [types.int64] * 10, generated)


def _latent_scores(heads: int, stored: ir.Type) -> Any:
    """As `_scores`, for entries [token][width]: a sum over lanes for each token."""
    size = 2 if stored is I16 else 4

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        q, pitch, table, first, count, base, page_bytes, width, out, out_pitch = arguments
        rows = [builder.add(q, builder.mul(pitch, integer(m))) for m in range(heads)]
        outs = [builder.add(out, builder.mul(out_pitch, integer(m))) for m in range(heads)]
        sums = [cgutils.alloca_once(builder, ir.VectorType(F32, LANES)) for _ in range(heads)]
        with cgutils.for_range_slice(builder, integer(0), count, integer(1), I64) as (number, _):
            page = _page(builder, table, builder.add(first, number), base, page_bytes)
            with cgutils.for_range_slice(builder, integer(0), integer(LANES), integer(1), I64) as (token, _):
                entry = builder.add(page, builder.mul(builder.mul(token, width), integer(size)))
                for slot in sums:
                    builder.store(constant(F32, 0.0), slot)

                def add(index: ir.Value, entry: ir.Value = entry) -> None:
                    at = builder.add(entry, builder.mul(index, integer(size)))
                    key = widened(builder, load(builder, at, stored))
                    for row, slot in zip(rows, sums, strict=True):
                        query = load(builder, offset(builder, row, builder.mul(index, integer(4))), F32)
                        builder.store(fma(builder, query, key, builder.load(slot)), slot)

                vectors(builder, width, add)
                place = builder.mul(builder.add(builder.mul(number, integer(LANES)), token), integer(4))
                for address, slot in zip(outs, sums, strict=True):
                    total = Vector(builder, builder.load(slot)).sum()
                    builder.store(total, pointer(builder, builder.add(address, place), F32))
        return context.get_dummy_value()

    return primitive(f"latent_scores_{heads}_{size}", types.void, [types.int64] * 10, generated)


def _next(builder: ir.IRBuilder, first: ir.Value, number: ir.Value, count: ir.Value) -> ir.Value:
    """The entry of the table after this one, or the last."""
    after, last = builder.add(number, integer(1)), builder.sub(count, integer(1))
    return builder.add(first, builder.select(builder.icmp_signed("<", after, count), after, last))


def _page(
    builder: ir.IRBuilder, table: ir.Value, entry: ir.Value, base: ir.Value, page_bytes: ir.Value
) -> ir.Value:
    at = builder.add(table, builder.mul(entry, integer(8)))
    number = builder.load(pointer(builder, at, I64), align=8)
    return builder.add(base, builder.mul(number, page_bytes))


def _by_heads(make: Any, stored: ir.Type) -> Any:
    """The function for up to `HEADS` heads: `f(heads, ...)`."""
    one, two, three, four = (make(heads, stored) for heads in range(1, HEADS + 1))

    @function
    def chosen(heads, a, b, c, d, e, f, g, h, i, j):
        if heads == 1:
            one(a, b, c, d, e, f, g, h, i, j)
        elif heads == 2:
            two(a, b, c, d, e, f, g, h, i, j)
        elif heads == 3:
            three(a, b, c, d, e, f, g, h, i, j)
        else:
            four(a, b, c, d, e, f, g, h, i, j)

    return chosen


scores_16, scores_32 = _by_heads(_scores, I16), _by_heads(_scores, F32)
sums_16, sums_32 = _by_heads(_sums, I16), _by_heads(_sums, F32)
latent_scores_16, latent_scores_32 = _by_heads(_latent_scores, I16), _by_heads(_latent_scores, F32)


@function
def some_scores(latent, stored, heads, a, b, c, d, e, f, g, h, i, j):
    """`_scores` or `_latent_scores`, of keys in either dtype."""
    if latent and stored == 2:
        latent_scores_16(heads, a, b, c, d, e, f, g, h, i, j)
    elif latent:
        latent_scores_32(heads, a, b, c, d, e, f, g, h, i, j)
    elif stored == 2:
        scores_16(heads, a, b, c, d, e, f, g, h, i, j)
    else:
        scores_32(heads, a, b, c, d, e, f, g, h, i, j)


@function
def some_sums(stored, heads, a, b, c, d, e, f, g, h, i, j):
    """`_sums`, of values in either dtype."""
    if stored == 2:
        sums_16(heads, a, b, c, d, e, f, g, h, i, j)
    else:
        sums_32(heads, a, b, c, d, e, f, g, h, i, j)


@function
def spans_of(position: int, window: int) -> tuple[int, int]:
    """The first page that the token at this position sees, and its spans."""
    first = max(0, position + 1 - window) // LANES if window else 0
    return first, (position + 1 - first * LANES + SPAN - 1) // SPAN


@function
def attend(
    op: int, item: int, most_spans: int, positions: int, tables: int, table_bytes: int, scratch: int
) -> None:
    """One row's queries of one key/value head (latent attention: of `HEADS` heads) over one span.

    `scratch` holds `HEADS` rows of scores of a span. `partial` holds for each row and query head the finished spans:
    [span][largest score, sum of weights, 14 unused, elements], and `ended` counts them.
    """
    (_, q, q_pitch, groups, shared, latent, width, q_step, keys, values, page_bytes, value_width, stored, window,
     softcap, sinks, scale, partial, ended, out, out_pitch, each) = fields(op, 22)  # fmt: skip
    row, rest = item // (groups * most_spans), item % (groups * most_spans)
    group, span = rest // most_spans, rest % most_spans
    position = read_i64(positions + 8 * row)
    first_page, spans = spans_of(position, window)
    if span >= spans:
        return
    table = tables + row // each * table_bytes
    first = first_page * LANES + span * SPAN
    last = min(first + SPAN, position + 1)
    count = (last - first + LANES - 1) // LANES
    padded = (value_width + LANES - 1) // LANES * LANES
    entry_bytes = 4 * (LANES + padded)
    pitch = 4 * SPAN
    for head in range(group * shared, (group + 1) * shared, HEADS):
        heads = min(HEADS, (group + 1) * shared - head)
        query = q + row * q_pitch + head * q_step
        base = keys if latent else keys + group * width * LANES * stored
        some_scores(latent, stored, heads, query, q_step, table, first // LANES, count, base, page_bytes, width,
                    scratch, pitch)  # fmt: skip
        for m in range(heads):
            scores = scratch + m * pitch
            length = count * LANES
            scaled(scores, scores, as_float(scale), length)
            if as_float(softcap) > 0.0:
                capped(scores, scores, as_float(softcap), length)
            for i in range(last - first, length):
                write_f32(scores + 4 * i, HIDDEN)
            if window:
                for i in range(0, position + 1 - window - first):
                    write_f32(scores + 4 * i, HIDDEN)
            most = largest(scores, length)
            total = weights_of(scores, most, length)
            entry = partial + ((row * groups * shared + head + m) * most_spans + span) * entry_bytes
            write_f32(entry, most)
            write_f32(entry + 4, total)
        results = partial + ((row * groups * shared + head) * most_spans + span) * entry_bytes + 4 * LANES
        results_pitch = most_spans * entry_bytes
        for d in range(0, padded, LANES):
            if latent:
                base, token_bytes = keys + d * stored, width * stored
            else:
                base, token_bytes = values + (group * width + d) * LANES * stored, LANES * stored
            some_sums(stored, heads, scratch, pitch, table, first // LANES, count, base, page_bytes, token_bytes,
                      results + 4 * d, results_pitch)  # fmt: skip
    counter = ended + 8 * (row * groups + group)
    if spans > 1:
        if atomic_add(counter, 1) < spans - 1:
            return
        publish(counter, 0)
    for head in range(group * shared, (group + 1) * shared):
        start = partial + (row * groups * shared + head) * most_spans * entry_bytes
        sink = read_f32(sinks + 4 * head) if sinks else HIDDEN
        merge(start, spans, entry_bytes, padded, sink, out + row * out_pitch + 4 * head * padded)


@function
def merge(start: int, spans: int, entry_bytes: int, width: int, sink: float, out: int) -> None:
    """The weighted mean of a head's spans; a sink is one more weight without a value (arXiv:2309.17453 section 3.2)."""
    most = sink
    for span in range(spans):
        most = max(most, read_f32(start + span * entry_bytes))
    total = math.exp(sink - most)
    for span in range(spans):
        entry = start + span * entry_bytes
        total += read_f32(entry + 4) * math.exp(read_f32(entry) - most)
    for span in range(spans):
        entry = start + span * entry_bytes
        factor = math.exp(read_f32(entry) - most) / total
        if span == 0:
            scaled(out, entry + 4 * LANES, factor, width)
        else:
            plus_scaled(out, out, entry + 4 * LANES, factor, width)
