"""Packing a weight's tiles for `products`, again after every training step.

A weight is an address and, for each output and each input, a distance in bytes; -1 where there is nothing, which packs
a zero. So a matrix, its transpose, a slice of heads and rows in any order are one operation.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import (
    bfloat16_of,
    fields,
    float32_of,
    read_f32,
    read_i16,
    read_i32,
    read_i64,
    write_f32,
    write_i16,
    write_i32,
)
from farthing.model.kernels.native.rowwise import round_half_up
from farthing.model.kernels.native.sizes import GROUP, LANES, PACKED
from farthing.model.kernels.native.vector import F16, F32, I16, primitive

FLOAT32, BFLOAT16, INT8, INT4 = range(len(PACKED))


def _half(context, builder, signature, arguments):
    return builder.bitcast(builder.fptrunc(arguments[0], F16), I16)


def _single(context, builder, signature, arguments):
    return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), F32)


float16_of = primitive("float16_of", types.int16, [types.float32], _half)  # the nearest
float32_of_float16 = primitive("float32_of_float16", types.float32, [types.int16], _single)


@function
def element(source: int, stored: int, out: int, into: int) -> float:
    if out < 0 or into < 0:
        return 0.0
    if stored == 2:
        return float32_of(read_i16(source + out + into))
    return read_f32(source + out + into)


@function
def pack(op: int, item: int) -> None:
    """Pack the two blocks of one tile."""
    _, kind, source, stored, outs, ins, inputs, together, target, stride, _ = fields(op, 11)
    for block in range(2):
        place = target + (2 * item + block) * stride
        here = outs + 8 * LANES * (2 * item + block)
        if kind == FLOAT32:
            pack_float32(source, stored, here, ins, inputs, place)
        elif kind == BFLOAT16:
            pack_bfloat16(source, stored, here, ins, inputs, together, place)
        elif kind == INT8:
            pack_int8(source, stored, here, ins, inputs, place)
        else:
            pack_int4(source, stored, here, ins, inputs, place)


@function
def pack_float32(source: int, stored: int, outs: int, ins: int, inputs: int, place: int) -> None:
    for k in range(inputs):
        for n in range(LANES):
            value = element(source, stored, read_i64(outs + 8 * n), read_i64(ins + 8 * k))
            write_f32(place + 4 * (k * LANES + n), value)


@function
def pack_bfloat16(
    source: int, stored: int, outs: int, ins: int, inputs: int, together: int, place: int
) -> None:
    """`together` inputs, from the first on, lie side by side in memory."""
    for n in range(LANES):
        out = read_i64(outs + 8 * n)
        pairs = together // 2 if out >= 0 else 0
        first = source + out + read_i64(ins)
        if stored == 2:
            for pair in range(pairs):
                write_i32(place + 4 * (pair * LANES + n), read_i32(first + 4 * pair))
        else:
            for pair in range(pairs):
                low = bfloat16_of(read_f32(first + 8 * pair)) & 0xFFFF
                high = bfloat16_of(read_f32(first + 8 * pair + 4)) & 0xFFFF
                write_i32(place + 4 * (pair * LANES + n), low | high << 16)
        for k in range(2 * pairs, inputs):
            value = bfloat16_of(element(source, stored, out, read_i64(ins + 8 * k)))
            write_i16(place + 2 * ((k // 2 * LANES + n) * 2 + k % 2), value)


@function
def pack_int8(source: int, stored: int, outs: int, ins: int, inputs: int, place: int) -> None:
    for group in range(inputs // GROUP):
        record = place + group * (2 * LANES * (GROUP // 2) + 2 * LANES)
        for n in range(LANES):
            out, most = read_i64(outs + 8 * n), 0.0
            for k in range(group * GROUP, (group + 1) * GROUP):
                most = max(most, abs(element(source, stored, out, read_i64(ins + 8 * k))))
            half = float16_of(most / 127.0)
            scale = float32_of_float16(half)
            factor = 1.0 / scale if scale > 0.0 else 0.0
            for i in range(0, GROUP, 2):
                k = group * GROUP + i
                low = rounded(element(source, stored, out, read_i64(ins + 8 * k)) * factor, -127, 127)
                high = rounded(element(source, stored, out, read_i64(ins + 8 * k + 8)) * factor, -127, 127)
                write_i16(record + 2 * (i // 2 * LANES + n), low & 0xFF | (high & 0xFF) << 8)
            write_i16(record + LANES * GROUP + 2 * n, half)


@function
def pack_int4(source: int, stored: int, outs: int, ins: int, inputs: int, place: int) -> None:
    for group in range(inputs // GROUP):
        record = place + group * (LANES * GROUP // 2 + 4 * LANES)
        for n in range(LANES):
            out = read_i64(outs + 8 * n)
            least, most = 1e30, -1e30
            for k in range(group * GROUP, (group + 1) * GROUP):
                value = element(source, stored, out, read_i64(ins + 8 * k))
                least, most = min(least, value), max(most, value)
            half, low_half = float16_of((most - least) / 15.0), float16_of(least)
            scale, minimum = float32_of_float16(half), float32_of_float16(low_half)
            factor = 1.0 / scale if scale > 0.0 else 0.0
            for eight in range(GROUP // 8):
                for i in range(2):
                    word = 0
                    for q in range(4):
                        k = group * GROUP + 8 * eight + 2 * q + i
                        value = element(source, stored, out, read_i64(ins + 8 * k))
                        word |= rounded((value - minimum) * factor, 0, 15) << 4 * q
                    write_i16(record + 2 * ((eight * LANES + n) * 2 + i), word)
            write_i16(record + LANES * GROUP // 2 + 2 * n, half)
            write_i16(record + LANES * GROUP // 2 + 2 * LANES + 2 * n, low_half)


@function
def rounded(x: float, least: int, most: int) -> int:
    return min(max(round_half_up(x), least), most)
