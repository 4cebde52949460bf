"""What stands before every route: keys, bounds on a body, and headers that keep a browser from other machines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from http.cookies import SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qs, quote, unquote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farthing.serve.api.stream import to_json
from farthing.serve.errors import ApiError, loading
from farthing.serve.gateway import Gateway

COOKIE = "farthing_key"
DRAINED = 16  # a refused body is read on, up to so many of the largest bodies
DRAIN_SECONDS = 5.0
OPEN_PATHS = ("/health",)
_KEY_HEADERS = {"authorization", "x-api-key"}
_ENGINE_PATHS = (
    "/v1/",
    "/chat/",
    "/completions",
    "/responses",
    "/models",
    "/tokeniz",
    "/detokenize",
    "/metrics",
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware: 401 without a valid key, 413 for a body that is too large, 408 for one that comes too slowly.

    A key comes as `Authorization: Bearer KEY`, as `x-api-key: KEY`, or, from a browser, as the cookie that opening
    `/?key=KEY` once leaves.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if (
            scope["type"] == "http"
            and scope["method"] == "GET"
            and "key" in query
            and not _KEY_HEADERS & set(headers)
        ):
            await self._enter(query["key"][0], scope, receive, send)  # whatever key an older cookie holds
            return
        try:
            if scope["path"] not in OPEN_PATHS:
                self._check_host(headers)
                scope.setdefault("state", {})["caller"] = self._gateway.caller(key_of(headers))
                self._check_ready(scope["path"])
            self._check_length(headers)
        except ApiError as error:
            if scope["type"] == "http":
                await _drain(receive, self._gateway.bounds.body_bytes)
            await _refuse(error, scope, send)
            return
        bounded = _Body(receive, self._gateway.bounds.body_bytes, self._gateway.bounds.body_seconds)
        try:
            await self._app(scope, bounded, _with_headers(send))
        except ApiError as error:  # of reading the body
            await _refuse(error, scope, send)

    async def _enter(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A browser's first visit: the key goes into a cookie and out of the address."""
        try:
            self._gateway.caller(key)
        except ApiError as error:
            await _refuse(error, scope, send)
            return
        answer = RedirectResponse("/" + scope["path"].lstrip("/"), 303)  # "//host" would lead to another host
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer.set_cookie(_cookie(headers), quote(key), httponly=True, samesite="strict", max_age=30 * 86_400)
        await answer(scope, receive, send)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Without keys, a name of this machine is demanded: any other may be a web page's own, pointed at this machine
        so that its scripts may read what is answered (DNS rebinding)."""
        host = headers.get("host", "")
        if not self._gateway.keys.demanded and not _is_local(host):
            raise ApiError(
                f"without keys this server answers to addresses and to localhost, not to {host[:200]!r}; start it "
                "with --api-key",
                status=403,
                code="unknown_host",
            )

    def _check_ready(self, path: str) -> None:
        if not self._gateway.ready and path.startswith(_ENGINE_PATHS):
            raise loading()

    def _check_length(self, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._gateway.bounds.body_bytes:
            raise _too_large(self._gateway.bounds.body_bytes)


class _Body:
    """A request's body, bounded in bytes and time."""

    def __init__(self, receive: Receive, most_bytes: int, most_seconds: float) -> None:
        self._receive, self._left, self._most = receive, most_bytes, most_bytes
        self._until = asyncio.get_running_loop().time() + most_seconds
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiError("the body came too slowly", status=408, code="request_timeout") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                if not self._whole:
                    await _drain(self._receive, self._most)
                raise _too_large(self._most)
        return message


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key of a request, by its headers (names in lower case)."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    if "x-api-key" in headers:
        return headers["x-api-key"]
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie(headers))
    except Exception:
        return None
    return unquote(cookie.value) if cookie is not None else None


def _cookie(headers: Mapping[str, str]) -> str:
    """The name of a server's cookie: browsers send one host's cookies to all its ports."""
    try:
        port = urlsplit(f"//{headers.get('host', '')}").port
    except ValueError:
        port = None
    return f"{COOKIE}_{port}" if port else COOKIE


def _is_local(host: str) -> bool:
    """Whether a Host header holds an address, localhost or nothing."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in ("", "localhost") and not name.endswith(".localhost"):
            ip_address(name)
    except ValueError:
        return False
    return True


async def _drain(receive: Receive, most_bytes: int) -> None:
    """Read on for a while: who still sends when the connection is closed does not get to read why."""
    left, more = DRAINED * most_bytes, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(f"the body is larger than {most:,} bytes", status=413, code="body_too_large")


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Content-Security-Policy", _POLICY)
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("Referrer-Policy", "no-referrer")
        await send(message)

    return wrapped


async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": to_json(error.body)})
