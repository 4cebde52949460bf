"""The threads that run a step together: the caller and helpers that wait for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from farthing.base.machine import cpu_cores

Run = Callable[[int, int], int]


def threads() -> int:
    """Threads of a step: as many as torch uses, and no more than the container grants."""
    return min(torch.get_num_threads(), cpu_cores())


class Crew:
    """Helpers of this process, started when they are first needed. One step runs at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[threading.Semaphore] = []
        self._step: tuple[Run, int, object] | None = None

    def run(self, run: Run, words: int, count: int, owner: object) -> None:
        """Run a step, whose state is at address `words`, with `count` threads.

        Args:
            owner: keeps the state and the operations alive; a helper may look at them when the step has ended.
        """
        with self._lock:
            while len(self._calls) < count - 1:
                self._hire()
            self._step = (run, words, owner)
            for call in self._calls[: count - 1]:
                call.release()
            run(words, 0)
            self._step = None

    def _hire(self) -> None:
        call = threading.Semaphore(0)
        number = len(self._calls) + 1
        self._calls.append(call)
        name = f"farthing-kernels-{number}"
        threading.Thread(target=self._help, args=(call, number), name=name, daemon=True).start()

    def _help(self, call: threading.Semaphore, number: int) -> None:
        while True:
            call.acquire()
            step = self._step
            if step is not None:  # or the others did it all
                run, words, _ = step
                run(words, number)
            step = None


crew = Crew()

if hasattr(os, "register_at_fork"):  # threads do not survive a fork, and a lock may have been held
    os.register_at_fork(after_in_child=crew.__init__)  # type: ignore[misc]
