"""The state of a compiled step, and the call that runs a list of operations with all threads."""

from __future__ import annotations

import numpy as np
import torch

from farthing.model.kernels.native import library
from farthing.model.kernels.native.codes import ALIGNED_BITS, ITEM_BITS, WORDS, Word
from farthing.model.kernels.native.crew import crew, threads
from farthing.model.kernels.native.operations import Operations, aligned


class Session:
    """One user of compiled code.

    Args:
        kinds: of weights in the library, or `build.UPDATE`.
        scratch: bytes that each thread needs of its own.
        count: threads; by default all of this process.
        isa: the instruction set, by default the one in use.

    Raises:
        NoKernels: as `library.step`.
    """

    def __init__(
        self, kinds: tuple[str, ...], scratch: int = 64, count: int | None = None, isa: str | None = None
    ) -> None:
        self._step = library.step(kinds, isa)
        self.threads = count or threads()
        self._scratch = torch.empty(self.threads * aligned(scratch) + 64, dtype=torch.uint8)
        self._memory = np.zeros(WORDS + 8, np.int64)
        self._start = aligned(self._memory.ctypes.data)
        self._words = self._memory[(self._start - self._memory.ctypes.data) // 8 :]
        self[Word.SCRATCH] = aligned(self._scratch.data_ptr())
        self[Word.SCRATCH_BYTES] = aligned(scratch)

    def __setitem__(self, word: Word, value: int | np.ndarray) -> None:
        """Set a word, to the address of an array if it is one."""
        self._words[word] = value if isinstance(value, int) else value.ctypes.data

    def run(self, operations: Operations, rows: int = 1, exact: int | None = None) -> None:
        """Run the operations, for so many rows; all but the first `exact` may be rounded (see `Word.EXACT`)."""
        self[Word.ROWS], self[Word.DONE] = rows, 0
        self[Word.EXACT] = rows if exact is None else exact
        self[Word.STATE] = operations.address >> ALIGNED_BITS << ITEM_BITS
        crew.run(self._step, self._start, self.threads, (self, operations))
