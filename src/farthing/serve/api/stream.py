"""Server-sent events (WHATWG HTML, section 9.2), with comments that keep a silent connection open, and an end to the
work as soon as the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farthing.serve.errors import ApiError

KEEP_ALIVE_SECONDS = 10.0

T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8; NaN is no JSON and a fault of ours."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: yields (event name or "", JSON value); an ApiError becomes the last event.
        done: a last line of data after all events, as OpenAI's `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[tuple[str, Any], None], done: str = "[DONE]") -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(_leaves(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                coming = asyncio.create_task(anext(self._events, None))
                try:
                    event = await self._wait(coming, leaving, send)
                except ApiError as error:
                    await _write(send, _event("error", error.body))
                    break
                if event is None:
                    break
                await _write(send, _event(*event))
            if self._done:
                await _write(send, f"data: {self._done}\n\n".encode())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Gone, OSError):
            pass
        finally:
            leaving.cancel()
            await self._events.aclose()

    async def _wait(self, coming: asyncio.Task[T], leaving: asyncio.Task[None], send: Send) -> T:
        try:
            while True:
                await asyncio.wait(
                    (coming, leaving), timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    return coming.result()
                if leaving.done():
                    raise Gone
                await _write(send, b": keep-alive\n\n")
        finally:
            if not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError):
                    await coming


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; the work is cancelled as soon as the client is gone. Raises Gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_leaves(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await working


async def _leaves(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(name: str, value: Any) -> bytes:
    head = f"event: {name}\n".encode() if name and name != "error" else b""
    return head + b"data: " + to_json(value) + b"\n\n"
