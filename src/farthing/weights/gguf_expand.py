"""The quantised blocks of a .gguf's tensors as bfloat16, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from farthing.base.errors import UserError
from farthing.base.machine import cpu_cores
from farthing.weights.gguf_file import Tensor

_CHUNK = 1 << 18  # weights expanded at a time: a thread's float32 copies stay in its cache
_ONE, _HALF, _SHIFT = np.uint32(1), np.uint32(0x7FFF), np.uint32(16)
_NAN = np.uint16(0x7FC0)


class Expander:
    """Expands tensors chunk by chunk, on as many threads as the process may use cores."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def bfloat16(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """The tensor's numbers in its shape, uint16: the bits of bfloat16.

        Raises:
            UserError: for a type of block that gguf does not expand.
        """
        from gguf.quants import dequantize

        bits = np.empty(tensor.shape, np.uint16)
        stored, out = tensor.rows.reshape(-1, tensor.rows.shape[-1]), bits.reshape(-1, tensor.shape[-1])
        rows = max(1, _CHUNK // out.shape[1])

        def expand(start: int) -> None:
            # as one long row, for gguf works on sixteen rows at a time, however short they are
            wide = dequantize(stored[start : start + rows].reshape(1, -1), tensor.kind)
            out[start : start + rows] = rounded(wide).reshape(-1, out.shape[1])

        try:
            for _ in self._pool.map(expand, range(0, len(out), rows)):
                pass
        except NotImplementedError:
            raise UserError(
                f"its tensor {tensor.name} is of the type {tensor.kind.name}, which Farthing cannot expand"
            ) from None
        return bits


@contextmanager
def expander() -> Iterator[Expander]:
    """An expander, whose threads end with the block."""
    with ThreadPoolExecutor(cpu_cores(), "expand") as pool:
        yield Expander(pool)


def rounded(wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 as the bits of the nearest bfloat16, uint16; of two as near, the one that ends in 0."""
    words = np.ascontiguousarray(wide).view(np.uint32)
    bits = words >> _SHIFT
    bits &= _ONE
    bits += _HALF
    bits += words
    bits >>= _SHIFT
    found = bits.astype(np.uint16)
    if np.isnan(wide).any():  # their sums may have run over
        found[np.isnan(wide)] = _NAN
    return found
