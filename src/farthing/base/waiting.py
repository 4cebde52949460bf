"""What to say while something takes long: a line after two seconds, and now and then another with the time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Self

from farthing.base.figures import bytes_, duration
from farthing.base.terminal import one_line, say

FIRST = 2.0  # seconds until the first line
THEN = (8.0, 20.0, 30.0, 60.0)  # seconds to each further line; the last of them again and again
LEAST = 0.02  # share that must be done for an honest estimate of the time left
_BAR = 20  # characters
_innermost: ContextVar[Waiting | None] = ContextVar("waiting", default=None)


class Waiting:
    """Says what is being waited for, once that takes more than two seconds. Use as a context manager.

    While one inside another has something to say, the outer one is silent.

    Args:
        what: what is being done: "reading the data".
        say: called with each line, from a thread of its own.
        first, then: seconds to the first line, and to the further ones.
    """

    def __init__(
        self, what: str, say: Callable[[str], None], first: float = FIRST, then: tuple[float, ...] = THEN
    ) -> None:
        self._what, self._say, self._pauses = what, say, [first, *then]
        self._done = self._total = 0
        self._spoke = False
        self._inner: Waiting | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._outer = _innermost.get()
        if self._outer is not None:
            self._outer._inner = self
        self._token = _innermost.set(self)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer is not None:
            self._outer._inner = None
        _innermost.reset(self._token)
        self._over.set()
        self._thread.join()

    def at(self, done: int, total: int) -> None:
        """Note how much is done, for the lines to come."""
        self._done, self._total = done, total

    def line(self, seconds: float) -> str:
        """What there is to say after so many seconds."""
        share = self._done / self._total if self._total else 0.0
        if LEAST <= share < 1:
            left = duration(seconds * (1 - share) / share)
            return f"{self._what}: {self._done:,} of {self._total:,}, {left} left"
        if seconds < 2 * self._pauses[0]:
            return f"{self._what} …"
        return f"{self._what} … {duration(seconds)} so far"

    def _watch(self) -> None:
        pauses = self._pauses
        number = 0
        while not self._over.wait(pauses[min(number, len(pauses) - 1)]):
            inner = self._inner
            if inner is None or not inner._spoke:
                self._say(self.line(time.monotonic() - self._began))
                self._spoke = True
            number += 1


class Transfer(Waiting):
    """Says how far a download is, with a bar: where what it is a part of says so, or else on stderr.

    Args:
        what: "downloading pypi:x".
        measure: called for each line: bytes that are there, and all of them, 0 if that is not known.
    """

    def __init__(self, what: str, measure: Callable[[], tuple[int, int]]) -> None:
        outer = _innermost.get()
        super().__init__(what, outer._say if outer is not None else _on_stderr)
        self._measure = measure

    def line(self, seconds: float) -> str:
        done, total = self._measure()
        if done <= 0:
            return super().line(seconds)
        if not done < total:
            return f"{self._what}: {bytes_(done)} so far"
        share = done / total
        full = round(share * _BAR)
        bar = "█" * full + "░" * (_BAR - full)
        left = f", {duration(seconds * (1 - share) / share)} left" if share >= LEAST else ""
        return f"{self._what} {bar} {bytes_(done)} of {bytes_(total)}{left}"


def _on_stderr(text: str) -> None:
    say(one_line(text), sys.stderr)
