"""Products as operations: the threads' items are tiles of 32 outputs, for every row of the step.

A tile's sums stay in the thread's scratch until they are finished: stored, with a bias, added to the residual stream,
or as the halves of a SwiGLU, gate and up side by side in one tile.
"""

from __future__ import annotations

from typing import Any

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import fields, read_f32, read_i64, write_i64
from farthing.model.kernels.native.products import DOTS, product, to_bfloat16
from farthing.model.kernels.native.rowwise import added, copied, gelu_product, plus_scaled, silu_product
from farthing.model.kernels.native.sizes import ADD, LANES, SILU, STORE, TILE, TILE_BYTES
from farthing.model.kernels.native.target import Target

MOST_ROWS = 16  # of a product's variant, at most: a table of rows has as many entries to spare


def tiles(kind: str, target: Target) -> Any:
    """Make `f(xs, w, stride, k, tile, rows)`: a tile of up to `largest` rows, by the smallest variant that has room.

    Rows beyond `rows` are computed as well, from the entries that follow in `xs`, and not read.
    """
    sizes, blocks = target.rows(kind), target.blocks(kind)
    by_size = {size: product(kind, size, blocks, target) for size in sizes}
    # the same variant stands for sizes that were not generated
    one, two, three, four, six, eight, twelve = (
        by_size[min((size for size in sizes if size >= wanted), default=sizes[-1])]
        for wanted in (1, 2, 3, 4, 6, 8, 12)
    )
    largest = sizes[-1]

    @function
    def some(xs, w, stride, k, tile, rows):
        if rows == 1:
            one(xs, w, stride, k, tile)
        elif rows == 2:
            two(xs, w, stride, k, tile)
        elif rows == 3:
            three(xs, w, stride, k, tile)
        elif rows == 4 and largest > 3:
            four(xs, w, stride, k, tile)
        elif rows <= 6 and largest > 4:
            six(xs, w, stride, k, tile)
        elif rows <= 8 and largest > 6:
            eight(xs, w, stride, k, tile)
        elif largest > 8:
            twelve(xs, w, stride, k, tile)

    @function
    def tile_of(xs, w, stride, k, tile, rows):
        done = 0
        passes = (rows + largest - 1) // largest
        for left in range(passes, 0, -1):
            count = (rows - done + left - 1) // left
            for block in range(0, 2, blocks):
                some(
                    xs + 8 * done, w + block * stride, stride, k, tile + TILE_BYTES * done + 64 * block, count
                )
            done += count

    return tile_of


@function
def rows_of(table: int, x: int, pitch: int, rows: int) -> None:
    """Write the addresses of rows, and the last one's again for variants with more rows."""
    for m in range(rows + MOST_ROWS):
        write_i64(table + 8 * m, x + min(m, rows - 1) * pitch)


@function
def finish(mode: int, tile: int, bias: int, y: int) -> None:
    """Finish one row of a tile."""
    if bias:
        added(tile, tile, bias, TILE)
    if mode == STORE:
        copied(y, tile, TILE)
    elif mode == ADD:
        added(y, y, tile, TILE)
    elif mode == SILU:
        silu_product(y, tile, tile + 4 * LANES, LANES)
    else:
        gelu_product(y, tile, tile + 4 * LANES, LANES)


def multiplier(kinds: tuple[str, ...], target: Target) -> tuple[Any, Any, Any]:
    """Make `multiply`, `experts_up` and `experts_down` for weights of these kinds, of which an operation has one."""
    first, second, third = (tiles(kind, target) for kind in (*kinds, *kinds[-1:] * (3 - len(kinds))))
    number = len(kinds)
    dotted = kinds.index("bfloat16") if target.dots and "bfloat16" in kinds else -1
    dots: Any = tiles(DOTS, target) if dotted >= 0 else None

    @function
    def tile_of(kind, xs, w, stride, k, tile, rows):
        if kind == 0:
            first(xs, w, stride, k, tile, rows)
        elif number > 1 and kind == 1:
            second(xs, w, stride, k, tile, rows)
        elif number > 2:
            third(xs, w, stride, k, tile, rows)

    @function
    def rounded(table, x, pitch, k, rows):
        """Write rows rounded to bfloat16 behind a table of their addresses."""
        place = (table + 8 * (rows + MOST_ROWS) + 63) // 64 * 64
        for m in range(rows):
            to_bfloat16(place + 2 * k * m, x + pitch * m, k)
        rows_of(table, place, 2 * k, rows)

    @function
    def multiply(op, item, rows, exact, scratch):
        """Some tiles of y = x W^T, of one of `parts` products whose operands lie a step apart. Rows after the `exact`
        ones are rounded to bfloat16 where that is faster."""
        (_, kind, x, x_pitch, x_step, k, w, w_step, stride, count, grain, bias, mode, y, y_pitch, y_step,
         _) = fields(op, 17)  # fmt: skip
        items = (count + grain - 1) // grain
        part, start = item // items, item % items * grain
        table, tile = scratch, scratch + 8 * (rows + MOST_ROWS)
        rows_of(table, x + part * x_step, x_pitch, rows)
        floats, short = rows, tile + TILE_BYTES * (rows + MOST_ROWS)
        if dotted >= 0 and kind == dotted and exact < rows:
            floats = exact
            rounded(short, x + part * x_step + floats * x_pitch, x_pitch, k, rows - floats)
        bytes_done = 64 if mode >= SILU else TILE_BYTES
        for number in range(start, min(start + grain, count)):
            weights = w + part * w_step + 2 * number * stride
            tile_of(kind, table, weights, stride, k, tile, floats)
            if dotted >= 0 and floats < rows:
                dots(short, weights, stride, k, tile + TILE_BYTES * floats, rows - floats)
            here = bias + TILE_BYTES * number if bias else 0
            for m in range(rows):
                out = y + m * y_pitch + part * y_step + bytes_done * number
                finish(mode, tile + TILE_BYTES * m, here, out)

    @function
    def experts_up(op, item, scratch):
        """Some tiles of one expert's gated inner product, for the rows that chose it (see `experts.assign`)."""
        (_, kind, x, x_pitch, top_k, k, w, w_step, stride, count, grain, members, y, y_pitch, _) = fields(
            op, 15
        )
        items = (count + grain - 1) // grain
        expert, start = item // items, item % items * grain
        first, last = read_i64(members + 8 * expert), read_i64(members + 8 * expert + 8)
        rows = last - first
        if rows == 0:
            return
        places = read_i64(members - 8)
        table, tile = scratch, scratch + 8 * (rows + MOST_ROWS)
        for m in range(rows + MOST_ROWS):
            place = read_i64(places + 8 * (first + min(m, rows - 1)))
            write_i64(table + 8 * m, x + place // top_k * x_pitch)
        for number in range(start, min(start + grain, count)):
            tile_of(kind, table, w + expert * w_step + 2 * number * stride, stride, k, tile, rows)
            for m in range(rows):
                finish(SILU, tile + TILE_BYTES * m, 0, y + (first + m) * y_pitch + 64 * number)

    @function
    def experts_down(op, item, scratch):
        """One tile of the sum over a row's experts of gate times output, added to the residual stream; experts in
        order, so that the sum does not depend on the threads."""
        (_, kind, x, x_pitch, top_k, k, w, w_step, stride, experts, members, gates, y, y_pitch,
         _) = fields(op, 15)  # fmt: skip
        places = read_i64(members - 8)
        for expert in range(experts):
            first, last = read_i64(members + 8 * expert), read_i64(members + 8 * expert + 8)
            rows = last - first
            if rows == 0:
                continue
            table, tile = scratch, scratch + 8 * (rows + MOST_ROWS)
            rows_of(table, x + first * x_pitch, x_pitch, rows)
            tile_of(kind, table, w + expert * w_step + 2 * item * stride, stride, k, tile, rows)
            for m in range(rows):
                place = read_i64(places + 8 * (first + m))
                out = y + place // top_k * y_pitch + TILE_BYTES * item
                plus_scaled(out, out, tile + TILE_BYTES * m, read_f32(gates + 4 * place), TILE)

    return multiply, experts_up, experts_down
