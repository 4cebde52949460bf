"""The step: every thread runs this function over the same list of operations.

An operation has items that do not depend on each other. One atomic word holds the current operation and its next item:
a thread claims an item by adding one. Whoever completes an operation's last item moves the word to the next operation.
Nobody waits for a thread that has claimed nothing, so one that is late, or lost its core to another process, takes
fewer items and holds up none.

One function runs every network, quantized or not. What differs is the list (`engine.network` writes it), whose
operations are `OPERATION_BYTES` long: a code, then fields.
"""

from __future__ import annotations

from typing import Any

from farthing.model.kernels.native.attend import attend
from farthing.model.kernels.native.codes import (
    ALIGNED_BITS,
    ITEM_BITS,
    MOST_ITEMS,
    OPERATION_BYTES,
    Code,
    Word,
    place,
)
from farthing.model.kernels.native.draw import draw
from farthing.model.kernels.native.experts import assign, route
from farthing.model.kernels.native.jit import function, kernel
from farthing.model.kernels.native.matmul import multiplier
from farthing.model.kernels.native.memory import atomic_add, give_way, look, publish, read_i64
from farthing.model.kernels.native.pack import pack
from farthing.model.kernels.native.rowwise import cap, embed, norm, quantize, rotate, rotate_latent
from farthing.model.kernels.native.target import Target
from farthing.model.kernels.native.update import adamw, squares

SPINS = 2000  # looks at the word before a thread offers its core to others
_PARTS, _COUNT, _GRAIN = (place(Code.MULTIPLY, name) for name in ("parts", "count", "grain"))
_UPS, _UP_COUNT, _UP_GRAIN = (place(Code.EXPERTS_UP, name) for name in ("experts", "count", "grain"))
_DOWN_COUNT, _PACKED = place(Code.EXPERTS_DOWN, "count"), place(Code.PACK, "count")
_SQUARED, _UPDATED = place(Code.SQUARES, "items"), place(Code.ADAMW, "items")
_GROUPS, _REPEATS = place(Code.ATTEND, "groups"), place(Code.QUANTIZE, "repeats")


@function
def _in_grains(count: int, grain: int) -> int:
    return (count + grain - 1) // grain


def runner(items_of: Any, work: Any) -> Any:
    """Make `run(words, thread)` of functions that say how many items an operation has, and do one."""

    @kernel()
    def run(words, thread):
        """One thread's part, from the operation that `Word.STATE` holds to END."""
        looks = 0
        while True:
            state = look(words + 8 * Word.STATE)
            op = state >> ITEM_BITS << ALIGNED_BITS
            code = read_i64(op)
            if code == Code.END:
                return 0
            if state & MOST_ITEMS >= items_of(op, code, words):
                looks += 1
                if looks > SPINS:
                    give_way()
                continue
            looks = 0
            state = atomic_add(words + 8 * Word.STATE, 1)  # of this operation, or already of a later one
            op = state >> ITEM_BITS << ALIGNED_BITS
            code = read_i64(op)
            if code == Code.END:
                return 0
            item, items = state & MOST_ITEMS, items_of(op, code, words)
            if item >= items:
                continue
            work(op, code, item, words, thread)
            if atomic_add(words + 8 * Word.DONE, 1) == items - 1:
                publish(words + 8 * Word.DONE, 0)
                publish(words + 8 * Word.STATE, (op + OPERATION_BYTES) >> ALIGNED_BITS << ITEM_BITS)

    return run


def updater() -> Any:
    """Make `run(words, thread)` of an optimizer's step."""

    @kernel()
    def items_of(op, code, words):
        if code == Code.SQUARES:
            return read_i64(op + _SQUARED)
        return read_i64(op + _UPDATED)

    @kernel()
    def work(op, code, item, words, thread):
        if code == Code.SQUARES:
            squares(op, item)
        elif code == Code.ADAMW:
            adamw(op, item)

    return runner(items_of, work)


def stepper(kinds: tuple[str, ...], target: Target) -> Any:
    """Make `run(words, thread)` for weights of these kinds; `words` is the address of the `Word`s."""
    multiply, experts_up, experts_down = multiplier(kinds, target)

    @kernel()
    def items_of(op, code, words):
        if code == Code.MULTIPLY:
            return read_i64(op + _PARTS) * _in_grains(read_i64(op + _COUNT), read_i64(op + _GRAIN))
        if code == Code.EXPERTS_UP:
            return read_i64(op + _UPS) * _in_grains(read_i64(op + _UP_COUNT), read_i64(op + _UP_GRAIN))
        if code == Code.EXPERTS_DOWN:
            return read_i64(op + _DOWN_COUNT)
        if code == Code.PACK:
            return read_i64(op + _PACKED)
        if code == Code.ASSIGN:
            return 1
        rows = read_i64(words + 8 * Word.ROWS)
        if code == Code.ATTEND:
            return rows * read_i64(op + _GROUPS) * read_i64(words + 8 * Word.SPANS)
        if code == Code.QUANTIZE:
            return rows * read_i64(op + _REPEATS)
        return rows

    @kernel()
    def work(op, code, item, words, thread):
        rows = read_i64(words + 8 * Word.ROWS)
        scratch = read_i64(words + 8 * Word.SCRATCH) + thread * read_i64(words + 8 * Word.SCRATCH_BYTES)
        if code == Code.MULTIPLY:
            multiply(op, item, rows, read_i64(words + 8 * Word.EXACT), scratch)
        elif code == Code.NORM:
            norm(op, item)
        elif code == Code.QUANTIZE:
            quantize(op, item)
        elif code == Code.ATTEND:
            tables, table_bytes = read_i64(words + 8 * Word.TABLES), read_i64(words + 8 * Word.TABLE_BYTES)
            most_spans = read_i64(words + 8 * Word.SPANS)
            attend(op, item, most_spans, read_i64(words + 8 * Word.POSITIONS), tables, table_bytes, scratch)
        elif code == Code.ROTATE:
            rotate(op, item, read_i64(words + 8 * Word.POSITIONS), read_i64(words + 8 * Word.PAGES))
        elif code == Code.ROTATE_LATENT:
            rotate_latent(op, item, read_i64(words + 8 * Word.POSITIONS), read_i64(words + 8 * Word.PAGES))
        elif code == Code.EXPERTS_UP:
            experts_up(op, item, scratch)
        elif code == Code.EXPERTS_DOWN:
            experts_down(op, item, scratch)
        elif code == Code.ROUTE:
            route(op, item, scratch)
        elif code == Code.ASSIGN:
            assign(op, rows)
        elif code == Code.EMBED:
            embed(op, item, read_i64(words + 8 * Word.IDS), read_i64(words + 8 * Word.EMBEDDING))
        elif code == Code.CAP:
            cap(op, item)
        elif code == Code.DRAW:
            draw(
                op,
                item,
                read_i64(words + 8 * Word.TEMPERATURES),
                read_i64(words + 8 * Word.UNIFORMS),
                read_i64(words + 8 * Word.CHOSEN),
                read_i64(words + 8 * Word.LOGPROBS),
                read_i64(words + 8 * Word.ENTROPIES),
                scratch,
            )
        elif code == Code.PACK:
            pack(op, item)

    return runner(items_of, work)
