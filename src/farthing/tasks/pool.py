"""Verification in processes that can be killed, with a wall-clock limit for each item.

The limit runs from when a worker begins an item until its verdict arrives, so waiting in a queue never
counts. A worker that hangs or dies is replaced and the rest of its batch is judged by the new one. The item itself
gets a second try with twice the time, since a stopped process or a swapping machine is late too; only then it is a
timeout.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from farthing.base.errors import UserError
from farthing.base.machine import cpu_cores
from farthing.tasks.extract import tail
from farthing.tasks.item import Convention, Item, Verdict
from farthing.tasks.rewards.beside import Beside
from farthing.tasks.rewards.total import own_files, patience

_BATCH = 64  # items a message
_START = 60.0  # seconds a worker may take to start and to read its batch
_LONGEST = 1_000_000  # characters of a completion that are sent
_ATTEMPTS = 2  # times an item may be with a worker when that is late or dies
# A thread of NumPy's takes address space, which is limited, and the processors are taken by other workers.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from farthing.tasks.worker import main; main(sys.argv[2])"
)


class VerifierPool:
    """`workers` processes that verify, at most `timeout` seconds an item, twice that in its second try. A context
    manager.

    There is one for each core that this process may use but one, unless `workers` says how many.

    `function` is the dotted name of what they call: (item, text, convention) -> Verdict. `asking` finds the parts of
    rewards that need a model.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 2.0,
        function: str = "farthing.tasks.verify.verify",
        asking: Beside | None = None,
    ) -> None:
        workers = max(1, cpu_cores() - 1) if workers is None else workers
        assert workers > 0
        assert timeout > 0
        self._timeout = timeout
        self._function = function
        self._workers: list[_Worker | None] = [_Worker(function, timeout) for _ in range(workers)]
        self._closed = False
        self.asking = asking or Beside()

    def verify(
        self, pairs: Sequence[tuple[Item, str]], convention: Convention, beside: bool = True
    ) -> list[Verdict]:
        """The verdicts on (item, completion) pairs, in their order; models are asked only if `beside`.

        Raises UserError when a reward file of the user's own cannot be imported in time, RuntimeError when the function
        itself raises or no worker can start.
        """
        assert not self._closed, "the pool is closed"
        job = _Job(pairs, convention, min(_BATCH, math.ceil(len(pairs) / len(self._workers))))
        try:
            with selectors.DefaultSelector() as selector:
                while job.left:
                    self._assign(job, selector)
                    self._serve(job, selector)
        except BaseException:
            self._discard()  # an interrupted exchange cannot be resumed
            raise
        if not beside:
            return job.verdicts
        return self.asking.completed(pairs, job.verdicts)

    def close(self) -> None:
        """Ends the workers. Further calls do nothing."""
        self._discard()
        self._closed = True

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assign(self, job: _Job, selector: selectors.BaseSelector) -> None:
        for place, worker in enumerate(self._workers):
            if (worker and worker.batch) or not job.waiting:
                continue
            if worker is None or worker.process.poll() is not None:
                if worker:
                    worker.end()
                worker = self._workers[place] = _Worker(self._function, self._timeout)
            worker.take(job)
            selector.register(worker.replies, selectors.EVENT_READ, place)
            selector.register(worker.requests, selectors.EVENT_WRITE, place)

    def _serve(self, job: _Job, selector: selectors.BaseSelector) -> None:
        """Move data through the pipes that are ready, then replace workers that are late or gone."""
        busy = [worker for worker in self._workers if worker and worker.batch]
        wait = min(worker.deadline for worker in busy) - time.monotonic()
        gone: set[int] = set()
        for key, events in selector.select(max(0.0, wait)):
            worker = self._workers[key.data]
            assert worker
            if events & selectors.EVENT_WRITE:
                if worker.write():
                    selector.unregister(worker.requests)
            elif not worker.read(job):
                gone.add(key.data)
            elif not worker.batch:
                selector.unregister(worker.replies)
        now = time.monotonic()
        for place, worker in enumerate(self._workers):
            if worker and worker.batch and (place in gone or now > worker.deadline):
                for stream in (worker.replies, worker.requests):
                    if stream in selector.get_map():
                        selector.unregister(stream)
                worker.give_back(job)
                worker.end()
                self._workers[place] = None

    def _discard(self) -> None:
        for worker in self._workers:
            if worker:
                worker.end()
        self._workers = [None] * len(self._workers)


class _Job:
    """The pairs of one call: which still wait for a worker, and the verdicts so far."""

    def __init__(self, pairs: Sequence[tuple[Item, str]], convention: Convention, batch: int) -> None:
        self.pairs = pairs
        self.convention = convention
        self.batch = batch
        self.waiting = deque(range(len(pairs)))
        self.left = len(pairs)
        self.verdicts = [Verdict("timeout")] * len(pairs)
        self.tries = [0] * len(pairs)  # that failed

    def settle(self, position: int, verdict: Verdict) -> None:
        self.verdicts[position] = verdict
        self.left -= 1


class _Worker:
    """One process and its pipes; `batch` holds the positions it has yet to answer."""

    def __init__(self, function: str, timeout: float) -> None:
        command = [sys.executable, "-I", "-c", _CODE, json.dumps(sys.path), function]
        # A session of its own: Ctrl-C in the terminal reaches the parent only.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, **_ONE_THREAD},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests = self.process.stdin.fileno()
        self.replies = self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.timeout = timeout
        self.batch: deque[int] = deque()
        self.seconds: deque[float] = deque()  # that each of them may take
        self.begun = False
        self.deadline = math.inf
        self.outgoing = memoryview(b"")
        self.incoming = b""

    def take(self, job: _Job) -> None:
        positions = [job.waiting.popleft() for _ in range(min(job.batch, len(job.waiting)))]
        items = [
            [_fields(item), _read_of(item, text)] for item, text in map(job.pairs.__getitem__, positions)
        ]
        self.seconds = deque(self.timeout + patience(job.pairs[at][0]) for at in positions)
        request = {"convention": job.convention, "items": items, "seconds": list(self.seconds)}
        message = json.dumps(request).encode() + b"\n"
        self.batch, self.begun = deque(positions), False
        self.outgoing, self.incoming = memoryview(message), b""
        self.deadline = time.monotonic() + _START

    def write(self) -> bool:
        """Write as much as the pipe takes now; True when everything is sent or the worker is gone."""
        try:
            self.outgoing = self.outgoing[os.write(self.requests, self.outgoing) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            return True  # reading will notice too, and settle the item
        return not self.outgoing

    def read(self, job: _Job) -> bool:
        """Read the replies that have arrived; False when the worker is gone."""
        arrived = os.read(self.replies, 1 << 16)
        *lines, self.incoming = (self.incoming + arrived).split(b"\n")
        for line in lines:
            reply: Any = json.loads(line)
            if isinstance(reply, dict):
                raise RuntimeError(f"the verifier failed on {job.pairs[self.batch[0]][0]}\n{reply['error']}")
            if reply:
                job.settle(self.batch.popleft(), Verdict(*reply))
                self.seconds.popleft()
            self.begun = True
            if self.batch:
                tries = 1 + job.tries[self.batch[0]]
                self.deadline = time.monotonic() + self.seconds[0] * tries
        return bool(arrived)

    def give_back(self, job: _Job) -> None:
        """Settle the current item as a timeout if it has had its tries; requeue the rest."""
        at = self.batch[0]
        job.tries[at] += 1
        if not self.begun and job.tries[at] == _ATTEMPTS:
            if files := own_files(job.pairs[place][0] for place in self.batch):
                raise UserError(
                    f"{' or '.join(files)}: importing it ends the process or takes longer than {_START:.0f} seconds; "
                    "what a file of rewards does when it is imported must be quick"
                )
            raise RuntimeError(f"a verifier process does not start (exit code {self.process.poll()})")
        if self.begun and job.tries[at] == _ATTEMPTS:
            job.settle(self.batch.popleft(), Verdict("timeout"))
        job.waiting.extendleft(reversed(self.batch))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


def _read_of(item: Item, text: str) -> str:
    """What of a completion is sent: rewards by name may look at all of it, the others read its end."""
    return text[-_LONGEST:] if item.metadata["scorer"] == "rewards" else tail(text)


def _fields(item: Item) -> list[Any]:
    return [item.task, item.seed, item.index, item.question, item.answer, dict(item.metadata)]
