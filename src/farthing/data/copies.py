"""Copies and near copies of documents, such as those kept for validation, found among the documents to train on.

Two documents are near copies when half of either stands in the other: of its runs of 13 words (as GPT-3 compared
documents, arXiv:2005.14165, appendix C), an eighth is compared, chosen by hash. Runs that several of the documents have
in common, such as a licence, do not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import numpy as np

from farthing.data.overlap import runs_of
from farthing.data.words import spelling, split

RUN = 13  # words
HALF = 0.5
FEWEST = 16  # runs of the shorter document; below that, only a document of the same words is a copy
_SAMPLED = np.uint64(8)  # one of so many runs is kept
_ALL = 512  # runs of a document up to which all are kept
_CACHED = 1 << 17


class NearCopies:
    """An index of documents; false if there are none. About two bytes for each of their words."""

    def __init__(self, documents: Iterable[str] = ()) -> None:
        self._numbers = _Numbers()
        kept: list[np.ndarray] = []
        self._whole: set[bytes] = set()
        for text in documents:
            numbers = self._numbers.of(text)
            if (whole := numbers.tobytes()) in self._whole:
                continue
            self._whole.add(whole)
            kept.append(_kept(_runs(numbers)))
        every = np.concatenate([np.empty(0, np.uint64), *kept])
        owners = np.repeat(np.arange(len(kept), dtype=np.int32), [len(runs) for runs in kept])
        self._table, first, times = np.unique(every, return_index=True, return_counts=True)
        self._owners = np.where(times == 1, owners[first], -1)
        self._sizes = np.bincount(self._owners[self._owners >= 0], minlength=len(kept))
        self._all = np.array([len(runs) <= _ALL for runs in kept], dtype=bool)

    def __bool__(self) -> bool:
        return bool(self._whole)

    def holds(self, text: str) -> bool:
        """Whether a text is one of the documents or nearly so. Linear in the text."""
        if not self._whole:
            return False
        numbers = self._numbers.of(text)
        if numbers.tobytes() in self._whole:
            return True
        runs = _runs(numbers)
        rows = np.minimum(np.searchsorted(self._table, runs), max(0, len(self._table) - 1))
        owners = self._owners[rows[self._table[rows] == runs]] if len(self._table) else self._owners
        found, shared = np.unique(owners[owners >= 0], return_counts=True)
        ours = np.where(self._all[found], len(runs), len(_sampled(runs)))
        smaller = np.minimum(self._sizes[found], ours)
        enough = (self._sizes[found] >= FEWEST) & (len(runs) >= FEWEST)
        return bool((enough & (shared >= HALF * smaller)).any())


class _Numbers(dict[str, int]):
    """A number for each word as it is written, the same in every process; below zero for what is dropped."""

    def __missing__(self, word: str) -> int:
        spelt = spelling(word)
        if len(self) >= _CACHED:
            self.clear()
        number = self[word] = -1 if spelt is None else crc32(spelt.encode())
        return number

    def of(self, text: str) -> np.ndarray:
        """Numbers of a text's words: int64 [N]."""
        written = split(text)
        numbers = np.fromiter(map(self.__getitem__, written), dtype=np.int64, count=len(written))
        return numbers[numbers >= 0]


def _runs(numbers: np.ndarray) -> np.ndarray:
    """The different runs of a document, in order of their hashes."""
    return np.unique(runs_of(numbers, RUN))


def _sampled(runs: np.ndarray) -> np.ndarray:
    return runs[runs % _SAMPLED == 0]


def _kept(runs: np.ndarray) -> np.ndarray:
    return runs if len(runs) <= _ALL else _sampled(runs)
