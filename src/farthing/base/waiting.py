"""What to say while something takes long: a line after two seconds, and now and then another with the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from farthing.base.figures import duration

FIRST = 2.0  # seconds until the first line
THEN = (8.0, 20.0, 30.0, 60.0)  # seconds to each further line; the last of them again and again
LEAST = 0.02  # share that must be done for an honest estimate of the time left


class Waiting:
    """Says what is being waited for, once that takes more than two seconds. Use as a context manager.

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
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
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
            self._say(self.line(time.monotonic() - self._began))
            number += 1
