"""An engine's server as a child process: started, waited for, started again when it dies, ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence

import httpx

from farthing.base.errors import UserError

log = logging.getLogger("farthing.serve")

_POLL_SECONDS = 0.2
_END_SECONDS = 20.0  # to end by itself before it is killed
_RESTARTS = 3  # in a row without an hour between
_HOUR = 3600.0
# Linux ends a child with its parent, however that ends, if the child asks for it.
_TIED = "import ctypes,os,sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Process:
    """A server on a port of this machine.

    Args:
        command: that starts it.
        health: the path that answers 200 once it is ready.
        environment: variables of its own.
        key: that it demands.
    """

    def __init__(
        self, name: str, command: Sequence[str], port: int, health: str, environment: dict[str, str], key: str
    ) -> None:
        self.name, self.command, self._health = name, list(command), health
        self._environment = {**os.environ, **environment}
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self.ready = False
        self.said: deque[str] = deque(maxlen=20)  # its last lines; they stay in memory
        self._child: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start it, and wait until it is ready; from then on it is watched. Raises UserError if it ends before."""
        await self._begin()
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """End it, and wait for its end."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()
        await self.client.aclose()

    async def _begin(self) -> None:
        tied = [sys.executable, "-c", _TIED] if sys.platform == "linux" else []
        self._child = child = await asyncio.create_subprocess_exec(
            *tied,
            *self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            limit=1 << 20,
            start_new_session=True,  # Ctrl-C is for us: running answers end first
        )
        reading = asyncio.create_task(self._read(child))
        try:
            while child.returncode is None:
                with contextlib.suppress(httpx.HTTPError):
                    answer = await self.client.get(self._health, timeout=5.0)
                    if answer.status_code == 200:
                        self.ready = True
                        return
                await asyncio.sleep(_POLL_SECONDS)
            await reading
            raise UserError(f"{self._name} ended before it was ready ({_ended(child)}): {self.last_words}")
        except BaseException:
            await self._end()
            raise

    @property
    def _name(self) -> str:
        return f"the engine of {self.name}"

    @property
    def last_words(self) -> str:
        """The last line that it wrote."""
        return next((line for line in reversed(self.said) if line), "it wrote nothing")[:500]

    async def _read(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:  # a line beyond all measure
                continue
            if not line:
                await child.wait()
                return
            self.said.append(line.decode(errors="replace").strip())

    async def _watch(self) -> None:
        """Start it again whenever it dies, unless it dies again and again."""
        loop, ends = asyncio.get_running_loop(), deque[float](maxlen=_RESTARTS)
        while True:
            assert self._child is not None
            await self._child.wait()
            self.ready = False
            log.warning("%s ended (%s): %s", self._name, _ended(self._child), self.last_words)
            if len(ends) == _RESTARTS and loop.time() - ends[0] < _HOUR:
                log.error("%s ended too often and is not started again", self._name)
                return
            ends.append(loop.time())
            try:
                await self._begin()
                log.warning("%s was started again", self._name)
            except UserError as error:
                log.error("%s", error)

    async def _end(self) -> None:
        child = self._child
        if child is None or child.returncode is not None:
            return
        _signal(child, signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), _END_SECONDS)
        except TimeoutError:
            pass
        finally:
            if child.returncode is None:
                _signal(child, signal.SIGKILL)
                await child.wait()


def _signal(child: asyncio.subprocess.Process, number: int) -> None:
    """Send a signal to a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _ended(child: asyncio.subprocess.Process) -> str:
    code = child.returncode or 0
    return f"signal {-code}" if code < 0 else f"exit code {code}"
