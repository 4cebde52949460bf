"""The headers that keep the page to its own server, whatever a model writes into it."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio compiles its listeners in the browser ('unsafe-eval') and sets styles in place. A script within the page runs
# only with the nonce of this very answer: one that a model writes, or an onerror=, does not.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'nonce-{nonce}' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
_CLOSED = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy")  # the page needs no files
_ELSEWHERE = re.compile(
    rb'<meta property="og:image"\s+content="https?://[^"]*"\s*/>'
)  # Gradio's, for previews


class Guard:
    """ASGI middleware: a Content-Security-Policy with a nonce on each HTML page, written into its scripts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(_CLOSED):
            await PlainTextResponse("not found", 404)(scope, receive, send)
            return
        start: Message = {}
        parts: list[bytes] = []

        async def guarded(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                if headers.get("content-type", "").startswith("text/html"):
                    start = message
                    return
            if not start:
                await send(message)
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                nonce = secrets.token_urlsafe(16)
                html = _ELSEWHERE.sub(b"", b"".join(parts))
                html = html.replace(b"<script", b'<script nonce="' + nonce.encode() + b'"')
                headers = MutableHeaders(scope=start)
                headers["content-length"] = str(len(html))
                headers["content-security-policy"] = _POLICY.format(nonce=nonce)
                headers["cache-control"] = "no-store"
                await send(start)
                await send({"type": "http.response.body", "body": html})

        await self.app(scope, receive, guarded)
