"""The process that serves: loads the models, listens, drains.

It listens at once and says `loading` until the models are there, so that whoever starts it can wait for /health.
SIGTERM and Ctrl-C stop the listening; answers that are being written end first; a second Ctrl-C drops them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from farthing.base.errors import UserError

HEADER_SECONDS = 15.0  # to send the first line and headers
IDLE_TICKS = 5  # tenths of a second without an answer, in which the page shows the last one's end
LOCAL = ("127.0.0.1", "::1", "localhost")


class _Prompt(H11Protocol):
    """uvicorn's protocol, which waits forever for the rest of a request's first line and headers; this one does not.

    Between two requests of a connection it is uvicorn's keep-alive that closes it.
    """

    _impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    @property
    def _reading_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._reading_headers:
            self._calm()
        elif self._impatience is None:
            self._impatience = self.loop.call_later(HEADER_SECONDS, self._lose_patience)

    def _calm(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _lose_patience(self) -> None:
        self._impatience = None
        if self._reading_headers and not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address is taken or is none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's delay off only then: 40 ms for each answer and token.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({said}); give another --port or --host") from None
    return found


class _Server(uvicorn.Server):
    """uvicorn's server, which waits for every connection when it is told to end: for those that the page keeps open
    too, as long as a browser shows it."""

    def __init__(
        self, config: uvicorn.Config, busy: Callable[[], bool], end_page: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._busy, self._end_page = busy, end_page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_page_when_idle())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_page_when_idle(self) -> None:
        idle = 0
        while idle < IDLE_TICKS:
            await asyncio.sleep(0.1)
            idle = 0 if self._busy() else idle + 1
        self._end_page()


def server_of(app: FastAPI, busy: Callable[[], bool], end_page: Callable[[], None]) -> uvicorn.Server:
    """The server of an application; `run([socket])` answers until SIGTERM or Ctrl-C and lets running answers end.

    Args:
        busy: whether answers are being written.
        end_page: closes what the page keeps open; called once they have ended.
    """
    config = uvicorn.Config(
        app,
        http=_Prompt,
        ws="none",
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
        backlog=2048,
        lifespan="on",
    )
    return _Server(config, busy, end_page)
