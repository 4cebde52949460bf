"""Freed memory is kept, and given back where it adds up."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from farthing.base import heap


@pytest.mark.parametrize("failure", [OSError, AttributeError, TypeError])
def test_a_c_library_without_these_calls_is_no_fault(
    failure: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(_: None) -> None:
        raise failure

    monkeypatch.setattr(heap.ctypes, "CDLL", no_library)
    heap.keep_freed_memory()
    heap.give_back()


def test_memory_is_given_back_when_a_tenth_more_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    held = iter([100, 109, 111, 50, 54, 56, 60])
    monkeypatch.setattr(heap, "give_back", lambda: given.append(1))
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(held)))
    )
    watched = heap.Heap()
    assert len(given) == 1
    after = []
    for _ in range(7):
        watched.settle()
        after.append(len(given))
    assert after == [1, 1, 2, 2, 2, 3, 3]


GAPS = """
import sys, numpy, psutil
from farthing.base import heap
heap.keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
before = resident()
blocks = [numpy.ones(1 << 18) for _ in range(200)]  # 2 MiB each
del blocks[::2]
freed = resident()
heap.give_back()
print(before, freed, resident())
"""


def test_gaps_between_tensors_go_back_to_the_system() -> None:
    environment = os.environ | {"FARTHING_KERNELS": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", GAPS], capture_output=True, text=True, check=True, env=environment
    )
    before, freed, after = map(int, done.stdout.split())
    assert freed - before > 350 << 20
    assert after - before < 250 << 20
