"""The thread that runs the engines: requests come in from the event loop, tokens go back to it.

One thread steps all engines, so an engine needs no locks and the models of a server share the processor. The event loop
is woken once a step with everything that the step made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from farthing.base.errors import UserError
from farthing.base.heap import Heap
from farthing.engine.engine import Engine
from farthing.engine.sequence import Job, Request, ended

SETTLE_SECONDS = 1.0

log = logging.getLogger("farthing.serve")


class Update(NamedTuple):
    """What a step added to one sample of a request."""

    sample: int
    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]  # empty unless asked for
    finish_reason: str | None  # of the last update of a sample


@dataclass
class Share:
    """A request's share of the machine."""

    seconds: float = 0.0
    joules: float = 0.0


@dataclass(eq=False)
class Generation:
    """A request on its way. Everything but `updates` is written by the worker's thread."""

    engine: Engine
    request: Request
    loop: asyncio.AbstractEventLoop
    share: Share = field(default_factory=Share)
    job: Job | None = None
    queue: asyncio.Queue[list[Update] | Exception] = field(default_factory=asyncio.Queue)
    sent: list[int] = field(default_factory=list)  # tokens handed over, by sample
    ended: list[bool] = field(default_factory=list)
    weighed: int = 0  # tokens for which the request has been charged

    async def updates(self, seconds: float) -> AsyncGenerator[list[Update], None]:
        """Yield what each step adds, until all samples have ended.

        Raises:
            UserError: if the engine cannot take the request.
            EngineFailed: if a step fails.
            TimeoutError: if they have not ended after so many seconds.
        """
        left, until = self.request.samples, self.loop.time() + seconds
        while left:
            found = await asyncio.wait_for(self.queue.get(), max(0.0, until - self.loop.time()))
            if isinstance(found, Exception):
                raise found
            left -= sum(update.finish_reason is not None for update in found)
            yield found

    def fresh(self) -> list[Update]:
        """What is new since the last call."""
        assert self.job is not None
        found = []
        for number, sample in enumerate(self.job.samples):
            if self.ended[number]:
                continue
            start, end = self.sent[number], len(sample.ids)
            over = ended(sample, self.request.sampling)
            if end > start or over:
                found.append(
                    Update(
                        number,
                        sample.ids[start:end],
                        sample.logprobs[start:end],
                        sample.top[start:end],
                        sample.finish_reason if over else None,
                    )
                )
            self.sent[number], self.ended[number] = end, over
        return found


class EngineFailed(Exception):
    """A step failed: a fault of ours, or no memory."""


class Worker:
    """Runs `engines` in a thread of its own, from `start` to `stop`.

    Args:
        joules: reads the machine's energy so far.
    """

    def __init__(self, engines: Sequence[Engine], joules: Callable[[], float] = lambda: 0.0) -> None:
        self.active: dict[Engine, list[Generation]] = {engine: [] for engine in engines}
        self._busy_seconds = 0.0
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._power = Power(joules)
        self._heap, self._settled = Heap(), time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="farthing-engines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what still runs is dropped."""
        self._orders.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, engine: Engine, request: Request) -> Generation:
        """Queue a request; call it in the event loop that reads the answer."""
        generation = Generation(engine, request, asyncio.get_running_loop())
        self._orders.put(lambda: self._add(generation))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a request and free its pages before the next step; no effect on one that has ended."""
        self._orders.put(lambda: self._drop(generation))

    def order(self, what: Callable[[], None]) -> None:
        """Have something done between two steps."""
        self._orders.put(what)

    # ---- in the thread ----

    def take_busy_seconds(self) -> float:
        """Seconds that the engines ran since the last call."""
        seconds, self._busy_seconds = self._busy_seconds, 0.0
        return seconds

    def _add(self, generation: Generation) -> None:
        try:
            generation.job = generation.engine.add(generation.request)
        except UserError as error:
            self._tell([(generation, error)])
            return
        except Exception as error:  # or the thread would end, and with it every answer
            log.exception("a request could not be queued")
            self._tell([(generation, EngineFailed(str(error)))])
            return
        generation.sent = [0] * generation.request.samples
        generation.ended = [False] * generation.request.samples
        self.active[generation.engine].append(generation)

    def _drop(self, generation: Generation) -> None:
        if generation in self.active[generation.engine]:
            assert generation.job is not None
            generation.engine.cancel(generation.job)
            self.active[generation.engine].remove(generation)

    def _run(self) -> None:
        while True:
            busy = any(self.active.values())
            with contextlib.suppress(queue.Empty):
                while True:
                    order = self._orders.get(block=not busy)
                    if order is None:
                        return
                    with _logged("an order failed"):
                        order()
                    busy = True  # take what else is there, and go on
            for engine, generations in self.active.items():
                if not generations:
                    continue
                with _logged("a step of the engine failed; its requests are dropped"):
                    self._step(engine, generations)
                    continue
                for generation in list(generations):
                    self._drop(generation)
                    self._tell([(generation, EngineFailed("a step failed"))])

    def _step(self, engine: Engine, generations: list[Generation]) -> None:
        started = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        seconds = now - started
        self._busy_seconds += seconds
        if now - self._settled >= SETTLE_SECONDS:  # prompts of every length leave gaps in the heap
            self._heap.settle()
            self._settled = now
        found = [(generation, generation.fresh()) for generation in generations]
        self._charge([generation for generation, updates in found if updates] or generations, seconds)
        generations[:] = [generation for generation in generations if not all(generation.ended)]
        self._tell([(generation, updates) for generation, updates in found if updates])

    def _charge(self, served: Sequence[Generation], seconds: float) -> None:
        """Divide a step's time and energy by the tokens that went through the network for each request."""
        weights = []
        for generation in served:
            job = generation.job
            assert job is not None
            through = sum(generation.sent)
            if any(generation.sent):
                through += max(0, len(generation.request.ids) - job.cached)
            weights.append(max(1, through - generation.weighed))
            generation.weighed = through
        watts, total = self._power.watts(), sum(weights)
        for generation, weight in zip(served, weights, strict=True):
            part = seconds * weight / total
            generation.share.seconds += part
            generation.share.joules += part * watts

    def _tell(self, found: Sequence[tuple[Generation, list[Update] | Exception]]) -> None:
        """Hand over to the event loop, in one call."""
        if not found:
            return

        def deliver() -> None:
            for generation, what in found:
                generation.queue.put_nowait(what)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            found[0][0].loop.call_soon_threadsafe(deliver)


class Power:
    """Watts over the last second or so; reading the energy takes a while."""

    def __init__(self, joules: Callable[[], float]) -> None:
        self._joules, self._watts = joules, 0.0
        self._at, self._read = time.perf_counter(), joules()

    def watts(self) -> float:
        now = time.perf_counter()
        if now - self._at >= 1.0 or not self._watts:
            read = self._joules()
            if now > self._at:
                self._watts = max(0.0, read - self._read) / (now - self._at)
            self._at, self._read = now, read
        return self._watts


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """A fault of ours ends what it happened in, and not the thread on which all answers wait."""
    try:
        yield
    except Exception:
        log.exception(what)
