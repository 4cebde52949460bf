"""What the compiled step reads: a list of operations in memory, and the rows of numbers that they work on."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farthing.model.kernels.native.codes import FIELDS, OPERATION_FIELDS, Code
from farthing.model.kernels.native.sizes import TILE


def padded(count: int, to: int = TILE) -> int:
    """`count`, rounded up to a multiple."""
    return -(-count // to) * to


def bits(number: float) -> int:
    """A float64 as the int64 that an operation holds."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def aligned(address: int) -> int:
    """The next address at the start of a line of the cache."""
    return padded(address, 64)


def spread(groups: int, width: int, step: int) -> np.ndarray:
    """Which of `groups * width` entries stands in each place when groups begin `step` places apart; -1 for none."""
    places = np.full((groups, step), -1, dtype=np.int64)
    places[:, :width] = np.arange(groups * width).reshape(groups, width)
    return places.ravel()


@dataclass(frozen=True)
class Rows:
    """Rows of float32, `pitch` bytes apart."""

    memory: Tensor
    pitch: int

    def at(self, element: int = 0) -> int:
        """Address of an element of the first row."""
        return self.memory.data_ptr() + 4 * element

    def first(self, rows: int, width: int) -> Tensor:
        """The first rows, [rows, width]."""
        whole = self.pitch // 4
        return self.memory[: rows * whole].view(rows, whole)[:, :width]


class Repeated:
    """Operations of one code that are run again and again, made anew only when a field has changed."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._fields: list[dict[str, int]] = []
        self._operations = Operations()

    def of(self, fields: list[dict[str, int]]) -> Operations:
        """The operations with these fields, in this order."""
        if fields != self._fields:
            self._fields, self._operations = fields, Operations()
            for one in fields:
                self._operations.add(self._code, **one)
        return self._operations


class Operations:
    """A list of operations; an END follows the last."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self._memory: Tensor | None = None

    def __add__(self, other: Operations) -> Operations:
        """These, then those of another list."""
        both = Operations()
        both.rows = [*self.rows, *other.rows]
        return both

    def add(self, code: Code, **fields: float) -> None:
        """Append an operation. A float is passed by its bits, everything else as a whole number."""
        names = FIELDS[code].split()
        assert set(fields) == set(names), (code, set(fields) ^ set(names))
        values = [bits(v) if isinstance(v, float) else int(v) for v in map(fields.__getitem__, names)]
        self.rows.append([code, *values, *[0] * (OPERATION_FIELDS - 1 - len(names))])
        self._memory = None

    @property
    def address(self) -> int:
        """Of the first operation, a multiple of 64 as `Word.STATE` needs it."""
        if self._memory is None:
            rows = torch.tensor([*self.rows, [Code.END, *[0] * (OPERATION_FIELDS - 1)]], dtype=torch.int64)
            self._memory = torch.zeros(rows.numel() + 8, dtype=torch.int64)
            start = (aligned(self._memory.data_ptr()) - self._memory.data_ptr()) // 8
            self._memory[start : start + rows.numel()] = rows.flatten()
        return aligned(self._memory.data_ptr())
