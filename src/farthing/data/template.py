"""Chat templates, which are untrusted, rendered in a process of their own.

One process serves a template for as long as anything holds it, however many tokenizers share its text. A template that
computes too long, takes too much memory or writes too much costs that process, never this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

from farthing.base.errors import UserError
from farthing.data.template_pipe import CHARACTERS, SECONDS, read, write

_ANSWER = 12 * CHARACTERS + 100  # bytes of the longest reply: JSON needs at most 12 for a character
_PATIENCE = 120.0  # seconds of wall clock for a reply; a worker that computes has SECONDS of processor time
_ATTEMPTS = 2  # a machine that stands still for minutes is no template's fault
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from farthing.data.template_worker import main; "
    "main()"
)

_shared: weakref.WeakValueDictionary[str, ChatTemplate] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def chat_template(text: str) -> ChatTemplate:
    """The template of this text, by its hash: the same one, with its process, for as long as it is in use."""
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    with _sharing:
        template = _shared.get(key)
        if template is None:
            template = _shared[key] = ChatTemplate(text)
    return template


class Unrenderable(UserError):
    """A template that cannot be compiled or goes beyond its limits, whatever it is given."""


class ChatTemplate:
    """A chat template and the process that renders it. The process starts at once and is waited for by `render`."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._worker: _Worker | None = _Worker(text)

    def render(self, variables: dict[str, Any]) -> str:
        """The text of one conversation, as `marked`."""
        return self.marked(variables)[0]

    def marked(self, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]] | None]:
        """The text of one conversation, and the ranges of it between `{% generation %}` and its end; None if the
        template has no such marks. `variables` are what JSON can hold.

        Raises:
            Unrenderable: for a template that is broken or goes beyond its limits.
            UserError: when the template refuses this conversation. Both in words that follow "the chat template".
        """
        try:
            request = json.dumps(variables).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"cannot render this conversation, which is not plain data: {error}") from None
        if self._worker is not None and self._worker.owner != os.getpid():  # a fork shares its parent's pipes
            self._lock, self._worker = threading.Lock(), None
        with self._lock:
            for _ in range(_ATTEMPTS):
                self._worker = self._worker or _Worker(self._text)
                try:
                    kind, said, ranges = self._worker.ask(request)
                except _Silent:
                    continue
                except BaseException:  # an interrupted exchange cannot be resumed
                    self._end()
                    raise
                finally:
                    if self._worker and self._worker.ended:
                        self._end()
                if kind == "text":
                    return said, ranges and [(start, end) for start, end in ranges]
                if kind == "refused":
                    raise UserError(f"cannot render this conversation: {said}")
                raise Unrenderable(
                    f"is broken ({said})" if kind == "broken" else f"cannot be rendered: {said}"
                )
        raise Unrenderable(f"cannot be rendered: its process did not answer within {_PATIENCE:.0f} seconds")

    def _end(self) -> None:
        if self._worker:
            self._worker.end()
        self._worker = None


class _Silent(Exception):
    """A worker that neither answered nor ended in time."""


class _Worker:
    """A process with the template compiled or being compiled."""

    def __init__(self, text: str) -> None:
        self.owner = os.getpid()
        self.ended = False
        self._compiled = False
        self._text = text
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._close = weakref.finalize(self, _finish, self._process, self.owner)

    def ask(self, request: bytes) -> tuple[str, str, Any]:
        """(kind, text, marked) as in `template_worker`, of the compilation if that fails."""
        if not self._compiled:
            kind, said, _ = self._exchange(json.dumps(self._text).encode())
            if kind != "text":
                self.ended = True
                return kind, said, None
            self._compiled = True
        return self._exchange(request)

    def end(self) -> None:
        self._close()

    def _exchange(self, request: bytes) -> tuple[str, str, Any]:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests
        assert replies
        with suppress(BrokenPipeError):  # it is gone; how it went is said below
            write(requests, request)  # type: ignore[arg-type]
        with selectors.DefaultSelector() as selector:
            selector.register(replies, selectors.EVENT_READ)
            if not selector.select(_PATIENCE):
                self.ended = True
                raise _Silent
        reply = read(replies, _ANSWER)  # type: ignore[arg-type]
        if reply is None:
            self.ended = True
            return "limit", self._how_it_went(), None
        kind, said, ranges = json.loads(reply)
        return kind, said, ranges

    def _how_it_went(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"it takes more than {SECONDS:g} seconds"
        return f"it ends the process that renders it ({_named(code)})"


def _named(code: int) -> str:
    with suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"signal {-code}"


def _finish(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker and forget it; one that a fork inherited is left to its owner."""
    if os.getpid() == owner and process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with suppress(OSError):
                stream.close()
