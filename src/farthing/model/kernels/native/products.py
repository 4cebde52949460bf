"""Products of a few rows with packed weights: y[m, 0:16] = sum over k of x[m, k] w[k, 0:16].

A weight [outputs, inputs] is packed in blocks of 16 outputs, each a stream that is read once from start to end. Both
padded to whole blocks with zeros:

    float32    [inputs][16]
    bfloat16   [inputs / 2][16][2]: a register of pairs becomes two float32 registers with a shift and a mask
    int8       groups of 32 inputs: [16][16][2] int8, then 16 float16 scales (Q8_0's precision: 8.5 bits a weight)
    int4       groups of 32 inputs: [4][16][2] int16, then 16 scales and 16 minima in float16 (Q4_1's: 5 bits); bits
               4q to 4q+3 of an int16 are input 8a + 2q + i of output n, at place [a][n][i]

Rows of x are float32 for the first two. Beside bfloat16 weights they may be rounded to bfloat16 (`DOTS`): pairs of
inputs are multiplied and added in one instruction (`vdpbf16ps`), half as many as in float32. For the others rows are
int16 with one scale a row, whose pairs have such an instruction too (`vpmaddwd`, with VNNI `vpdpwssd`; LLVM finds it),
exact within a group.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from farthing.model.kernels.native.sizes import BLOCK_BYTES, GROUP, LANES, TILE_BYTES
from farthing.model.kernels.native.target import Target
from farthing.model.kernels.native.vector import (
    BF16,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    call,
    constant,
    fma,
    integer,
    load,
    offset,
    pointer,
    prefetch,
    primitive,
    splat,
    store,
    widened,
)

FLOAT = ("float32", "bfloat16")
DOTS = "dots"  # bfloat16 weights and rows


def product(kind: str, rows: int, blocks: int, target: Target) -> Any:
    """Make the numba function `f(xs, w, stride, k, tile)` for this many rows and blocks of outputs.

    Args of `f`: `xs` is the address of the rows' addresses; `w` of the first block, `stride` bytes before the next;
        `k` inputs, a multiple of 32. `tile` takes the sums, float32, `TILE_BYTES` from one row to the next.
    """

    def generated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        xs, w, stride, k, tile = arguments
        addresses = [
            builder.load(pointer(builder, offset(builder, xs, 8 * m), I64), align=8) for m in range(rows)
        ]
        streams = [w]
        for _ in range(1, blocks):
            streams.append(builder.add(streams[-1], stride))
        if kind == DOTS:
            sums = _dots(builder, addresses, streams, k)
        elif kind in FLOAT:
            sums = _float(builder, kind, addresses, streams, k)
        else:
            sums = _integer(builder, kind, addresses, streams, k, target)
        for m, row in enumerate(sums):
            for n, value in enumerate(row):
                store(builder, value, offset(builder, tile, TILE_BYTES * m + 64 * n))
        return context.get_dummy_value()

    return primitive(f"product_{kind}_{rows}x{blocks}", types.void, [types.int64] * 5, generated)


def _to_bfloat16(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    target, x, count = arguments
    floats = ir.VectorType(BF16, LANES)
    with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (at, _):
        value = load(builder, offset(builder, x, builder.mul(at, integer(4))), F32)
        short = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", floats, value)
        place = offset(builder, target, builder.mul(at, integer(2)))
        store(builder, builder.bitcast(short, ir.VectorType(I16, LANES)), place)
    return context.get_dummy_value()


# `f(out, x, count)`: the nearest bfloat16 of each float32, for `DOTS`
to_bfloat16 = primitive("to_bfloat16", types.void, [types.int64] * 3, _to_bfloat16)

AHEAD = 2048  # bytes of a stream that are on their way while others are used
Sums = list[list[ir.Value]]  # [rows][blocks]


class _Accumulators:
    """Vectors that a loop adds to; `chains` of each, so that one addition need not wait for the last."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, rows: int, blocks: int, chains: int) -> None:
        self.builder, kind = builder, ir.VectorType(element, LANES)
        self.slots = [
            [[cgutils.alloca_once(builder, kind) for _ in range(chains)] for _ in range(blocks)]
            for _ in range(rows)
        ]
        for row in self.slots:
            for block in row:
                for slot in block:
                    builder.store(constant(element, 0), slot)

    def multiply_add(self, m: int, n: int, chain: int, x: ir.Value, w: ir.Value) -> None:
        slot = self.slots[m][n][chain % len(self.slots[m][n])]
        self.builder.store(fma(self.builder, x, w, self.builder.load(slot)), slot)

    def dot(self, m: int, n: int, chain: int, x: ir.Value, w: ir.Value) -> None:
        """Add the products of both halves of each lane, bfloat16 pairs."""
        slot = self.slots[m][n][chain % len(self.slots[m][n])]
        before = self.builder.load(slot)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        self.builder.store(call(self.builder, name, before.type, before, x, w), slot)

    def sums(self) -> Sums:
        return [[self._sum(block) for block in row] for row in self.slots]

    def _sum(self, slots: list[ir.Value]) -> ir.Value:
        total = self.builder.load(slots[0])
        for slot in slots[1:]:
            total = self.builder.fadd(total, self.builder.load(slot))
        return total


def _float(builder: ir.IRBuilder, kind: str, xs: list[ir.Value], ws: list[ir.Value], k: ir.Value) -> Sums:
    """Four inputs an iteration."""
    chains = max(1, 4 // (len(xs) * len(ws)))
    out = _Accumulators(builder, F32, len(xs), len(ws), chains)
    with cgutils.for_range_slice(builder, integer(0), k, integer(4), I64) as (at, _):
        x_at = builder.mul(at, integer(4))
        w_at = builder.mul(at, integer(BLOCK_BYTES[kind]))
        for w in ws:
            for line in range(0, 4 * BLOCK_BYTES[kind], 64):
                prefetch(builder, offset(builder, w, w_at, AHEAD + line))
        weights = [_four(builder, kind, offset(builder, w, w_at)) for w in ws]
        for i in range(4):
            for m, x in enumerate(xs):
                address = offset(builder, x, x_at, 4 * i)
                value = splat(builder, builder.load(pointer(builder, address, F32), align=4))
                for n, four in enumerate(weights):
                    out.multiply_add(m, n, i, value, four[i])
    return out.sums()


def _dots(builder: ir.IRBuilder, xs: list[ir.Value], ws: list[ir.Value], k: ir.Value) -> Sums:
    """Two pairs of inputs an iteration."""
    out = _Accumulators(builder, F32, len(xs), len(ws), max(1, 4 // (len(xs) * len(ws))))
    pairs = ir.VectorType(BF16, 2 * LANES)
    with cgutils.for_range_slice(builder, integer(0), k, integer(4), I64) as (at, _):
        x_at, w_at = builder.mul(at, integer(2)), builder.mul(at, integer(BLOCK_BYTES["bfloat16"]))
        for w in ws:
            for line in (0, 64):
                prefetch(builder, offset(builder, w, w_at, AHEAD + line))
        for pair in range(2):
            weights = [
                builder.bitcast(load(builder, offset(builder, w, w_at, 64 * pair), I32), pairs) for w in ws
            ]
            for m, x in enumerate(xs):
                both = builder.load(pointer(builder, offset(builder, x, x_at, 4 * pair), I32), align=4)
                value = builder.bitcast(splat(builder, both), pairs)
                for n, weight in enumerate(weights):
                    out.dot(m, n, pair, value, weight)
    return out.sums()


def _four(builder: ir.IRBuilder, kind: str, address: ir.Value) -> list[ir.Value]:
    """The weights of four inputs, float32."""
    if kind == "float32":
        return [load(builder, offset(builder, address, 64 * i), F32) for i in range(4)]
    out = []
    floats = ir.VectorType(F32, LANES)
    for pair in range(2):
        both = load(builder, offset(builder, address, 64 * pair), I32)
        out.append(builder.bitcast(builder.shl(both, constant(I32, 16)), floats))
        out.append(builder.bitcast(builder.and_(both, constant(I32, 0xFFFF0000)), floats))
    return out


def _integer(
    builder: ir.IRBuilder, kind: str, xs: list[ir.Value], ws: list[ir.Value], k: ir.Value, target: Target
) -> Sums:
    """One group an iteration: exact sums in int32, then float32 by the group's scales."""
    out = _Accumulators(builder, F32, len(xs), len(ws), 1)
    record = GROUP * BLOCK_BYTES[kind]
    chains = max(1, 4 // (len(xs) * len(ws)))
    with cgutils.for_range_slice(builder, integer(0), k, integer(GROUP), I64) as (at, _):
        w_at = builder.mul(builder.udiv(at, integer(GROUP)), integer(record))
        x_at = builder.mul(at, integer(2))
        for n, w in enumerate(ws):
            here = offset(builder, w, w_at)
            for line in range(0, record, 64):
                prefetch(builder, offset(builder, here, AHEAD + line))
            exact = _group(builder, kind, [offset(builder, x, x_at) for x in xs], here, chains, target)
            scales = offset(builder, here, record - (32 if kind == "int8" else 64))
            scale = widened(builder, load(builder, scales, F16))
            for m, x in enumerate(xs):
                out.multiply_add(m, n, 0, builder.sitofp(exact[m], ir.VectorType(F32, LANES)), scale)
                if kind == "int4":
                    minimum = widened(builder, load(builder, offset(builder, scales, 32), F16))
                    sums = offset(builder, x, builder.mul(k, integer(2)), builder.udiv(x_at, integer(16)))
                    total = builder.load(pointer(builder, sums, F32), align=4)
                    out.multiply_add(m, n, 0, splat(builder, total), minimum)
    rows = out.sums()
    for m, x in enumerate(xs):  # the row's scale stands behind its group sums
        behind = offset(builder, x, builder.mul(k, integer(2)), builder.udiv(k, integer(GROUP // 4)))
        scale = splat(builder, builder.load(pointer(builder, behind, F32), align=4))
        rows[m] = [builder.fmul(value, scale) for value in rows[m]]
    return rows


def _group(
    builder: ir.IRBuilder, kind: str, xs: list[ir.Value], w: ir.Value, chains: int, target: Target
) -> list[ir.Value]:
    """The sums of each row over a group, int32."""
    sums: list[list[ir.Value | None]] = [[None] * chains for _ in xs]
    for pair, weights in enumerate(_pairs(builder, kind, w)):
        for m, x in enumerate(xs):
            both = builder.load(pointer(builder, offset(builder, x, 4 * pair), I32), align=2)
            x_pairs = builder.bitcast(splat(builder, both), ir.VectorType(I16, 2 * LANES))
            product = target.pairwise(builder, weights, x_pairs)
            before = sums[m][pair % chains]
            sums[m][pair % chains] = product if before is None else builder.add(before, product)
    out = []
    for parts in sums:
        total = parts[0]
        for part in parts[1:]:
            total = builder.add(total, part)
        out.append(total)
    return out


def _pairs(builder: ir.IRBuilder, kind: str, w: ir.Value) -> list[ir.Value]:
    """The 16 pairs of inputs of a group, each [16][2] int16."""
    wide = ir.VectorType(I16, 2 * LANES)
    if kind == "int8":
        return [
            builder.sext(load(builder, offset(builder, w, 32 * p), I8, 2 * LANES), wide)
            for p in range(GROUP // 2)
        ]
    out = []
    low = constant(I16, 15, 2 * LANES)
    for eight in range(GROUP // 8):
        words = load(builder, offset(builder, w, 64 * eight), I16, 2 * LANES)
        for nibble in range(4):
            shifted = builder.lshr(words, constant(I16, 4 * nibble, 2 * LANES)) if nibble else words
            out.append(builder.and_(shifted, low) if nibble < 3 else shifted)
    return out
