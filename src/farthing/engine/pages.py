"""Which pages of the cache are in use, and which hold the beginning of a sequence that may come again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Key = tuple[int, tuple[int, ...]]  # name of the previous page, tokens


class Pages:
    """Reference-counted pages of `page_size` tokens.

    A full page is looked up by its tokens and the page before it. Once nobody uses it, it stays until its room is
    needed: least recently used first, the end of a sequence before its beginning.

    Attributes:
        users: number of sequences that hold each page.
        epoch: number of times that all remembered pages were forgotten.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size, self.epoch = page_size, 0
        self.users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        # A page's name stands for all tokens up to its end and is never reused, so no chain leads through an evicted
        # page.
        self._known: dict[Key, tuple[int, int]] = {}  # key -> (page, its name)
        self._keys: dict[int, Key] = {}  # of the known pages
        self._idle: dict[int, None] = {}  # known pages that nobody uses, least recently used first
        self._names = itertools.count(1)

    @property
    def available(self) -> int:
        """Number of pages that `take` can allocate: free ones and unused remembered ones."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages that sequences hold."""
        return len(self.users) - self.available

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages; evicts remembered ones when no page is free. The caller checks `available`."""
        while len(self._free) < count:
            page = next(iter(self._idle))
            del self._idle[page]
            del self._known[self._keys.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.users[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add one use of each page."""
        for page in pages:
            self._idle.pop(page, None)
            self.users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one use of each page of a sequence; an unused page becomes free unless it is remembered."""
        for page in reversed(pages):
            self.users[page] -= 1
            assert self.users[page] >= 0
            if self.users[page] == 0 and page in self._keys:
                self._idle[page] = None
            elif self.users[page] == 0:
                self._free.append(page)

    def _chunks(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.page_size
        return [tuple(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]

    def find_prefix(self, ids: Sequence[int]) -> list[int]:
        """Return the pages that already hold the beginning of ids, each with one more use; leaves at least one token to
        compute."""
        pages: list[int] = []
        name = 0
        for chunk in self._chunks(ids[: len(ids) - 1]):
            if (name, chunk) not in self._known:
                break
            page, name = self._known[name, chunk]
            pages.append(page)
        self.share(pages)
        return pages

    def remember(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Register the full pages of a computed sequence for `find_prefix`; they must be in use."""
        name = 0
        for chunk, page in zip(self._chunks(ids), pages, strict=False):
            if (name, chunk) not in self._known:
                if page in self._keys:  # known after a page that was evicted since
                    self._known[name, chunk] = self._known.pop(self._keys[page])
                else:
                    self._known[name, chunk] = (page, next(self._names))
                self._keys[page] = (name, chunk)
            name = self._known[name, chunk][1]

    def forget(self) -> None:
        """Drop all remembered pages; their keys are stale once the weights change."""
        self._free += self._idle
        self._idle.clear()
        self._known.clear()
        self._keys.clear()
        self.epoch += 1
