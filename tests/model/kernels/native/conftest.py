"""Runs single operations of the compiled step, in every instruction set that this machine has kernels for."""

import numpy as np
import pytest
import torch

from farthing.base import processor
from farthing.model.kernels.native import library
from farthing.model.kernels.native.codes import ALIGNED_BITS, ITEM_BITS, WORDS, Word
from farthing.model.kernels.native.crew import Crew
from farthing.model.kernels.native.operations import Operations

CREW = Crew()
SETS = [isa for isa in processor.levels() if isa in library.FUSED and isa in {"avx2", processor.levels()[-1]}]


class Machine:
    """A step's state around one list of operations."""

    def __init__(self, isa, threads=2):
        self.isa, self.threads = isa, threads
        self.scratch = torch.zeros(threads << 20, dtype=torch.uint8)

    def run(self, operations, rows=1, kinds=("int4", "int8", "bfloat16"), **arrays):
        """Run operations over `rows`; arrays go to the words of their names."""
        words = np.zeros(WORDS + 8, np.int64)
        start = -(-words.ctypes.data // 64) * 64
        at = words[(start - words.ctypes.data) // 8 :]
        at[Word.ROWS], at[Word.SPANS] = rows, arrays.pop("spans", 1)
        at[Word.SCRATCH], at[Word.SCRATCH_BYTES] = self.scratch.data_ptr(), 1 << 20
        for name, value in arrays.items():
            at[Word[name.upper()]] = value if isinstance(value, int) else value.ctypes.data
        at[Word.STATE] = operations.address >> ALIGNED_BITS << ITEM_BITS
        CREW.run(library.step(kinds, self.isa), start, self.threads, (words, operations))

    def one(self, code, rows=1, kinds=("int4", "int8", "bfloat16"), arrays=None, **fields):
        """Run a single operation."""
        operations = Operations()
        operations.add(code, **fields)
        self.run(operations, rows, kinds, **(arrays or {}))


@pytest.fixture(params=SETS or ["none"])
def machine(request):
    if why := library.lacks():
        pytest.skip(why)
    return Machine(request.param)
