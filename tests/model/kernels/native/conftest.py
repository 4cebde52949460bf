"""Runs single operations of the compiled step, in every instruction set that this machine has kernels for."""

import pytest

from farthing.base import processor
from farthing.model.kernels.native import library
from farthing.model.kernels.native.codes import Word
from farthing.model.kernels.native.operations import Operations
from farthing.model.kernels.native.session import Session

SETS = [isa for isa in processor.levels() if isa in library.FUSED and isa in {"avx2", processor.levels()[-1]}]
KINDS = ("int4", "int8", "bfloat16")


class Machine:
    """Runs operations with two threads in one instruction set."""

    def __init__(self, isa):
        self.isa = isa

    def run(self, operations, rows=1, kinds=KINDS, exact=None, **arrays):
        """Run operations over `rows`; arrays go to the words of their names."""
        session = Session(kinds, 1 << 20, count=2, isa=self.isa)
        session[Word.SPANS] = 1
        for name, value in arrays.items():
            session[Word[name.upper()]] = value
        session.run(operations, rows, exact)

    def one(self, code, rows=1, kinds=KINDS, arrays=None, **fields):
        """Run a single operation."""
        operations = Operations()
        operations.add(code, **fields)
        self.run(operations, rows, kinds, **(arrays or {}))


@pytest.fixture(params=SETS or ["none"])
def machine(request):
    if why := library.lacks():
        pytest.skip(why)
    return Machine(request.param)
