"""What may come in and go out of a server: the operator's moderation hook, and a policy before every conversation.

A hook judges text and names the categories it finds. It is a Python function, called as `function(text, direction)`, or
a server that answers as OpenAI's /v1/moderations. Both are named by whoever starts the server, never by a request.

A hook that fails or takes too long has judged nothing. In the mode `block` such text is blocked (fail closed); in the
mode `warn` it is let through, as all text is (fail open). Both are logged, without the text.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import queue
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.base.files import append_lines, appending, open_ready
from farthing.base.schema import MAX_BYTES, Strict, checked, parse_text
from farthing.base.sources import is_server
from farthing.base.terminal import one_line, say
from farthing.recipe.types import Text

Direction = Literal["prompt", "answer"]
Hook = Callable[[str, Direction], Awaitable[tuple[str, ...]]]  # the categories it finds

KEY = "FARTHING_MODERATION_KEY"  # environment variable with the classifier's key
SECONDS = 5.0  # a hook may take for one text
_THREADS = 4
_CONTEXT = 1000  # characters of an answer that a sentence is judged with
_LONGEST = 500  # characters without the end of a sentence that are held back
_NAME = 64  # characters of a category in the log
_SENTENCE = re.compile(r".*(?:[.!?…][\"'”’)\]*]*\s|[。！？\n])", re.DOTALL)
_FORM = "a reply that is not in the form of /v1/moderations"
_FORMS = "off, warn=HOOK or block=HOOK, with HOOK as module:function or http://HOST[:PORT]/v1/moderations"


@dataclass(frozen=True)
class Verdict:
    """What became of a text. A blocked one has categories, or `failed` if the hook could not judge it."""

    blocked: bool = False
    categories: tuple[str, ...] = ()
    failed: bool = False


class HookError(Exception):
    """Why a hook did not judge, without the text."""


class Blocked(Exception):
    """An answer may not go on; what was returned before may stay."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("blocked by moderation")
        self.verdict = verdict


class Moderation:
    """Judges prompts and answers.

    Args:
        mode: `off` asks no hook; `warn` logs what is found and delays nothing; `block` holds text back until judged.
        log: a .jsonl file that gets a line for each finding and failure, never the text.
        seconds: a hook's time for one text.
    """

    def __init__(
        self,
        mode: Literal["off", "warn", "block"] = "off",
        hook: Hook | None = None,
        *,
        log: Path | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self.mode, self._hook, self._log, self._seconds = mode, hook, log, seconds
        self._judging: set[asyncio.Task[Verdict]] = set()
        self._failed = False

    async def check(self, text: str, direction: Direction, *, key: str = "", model: str = "") -> Verdict:
        """Judge a text; in the mode `warn` in the background.

        Args:
            key, model: the names of the client's key and of the model, for the log.
        """
        if self._hook is None or self.mode == "off" or not text.strip():
            return Verdict()
        judging = self._judge(self._hook, text, direction, {"key": key, "model": model})
        if self.mode == "block":
            return await judging
        task = asyncio.create_task(judging)
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)
        return Verdict()

    async def close(self) -> None:
        """Wait for what is judged in the background."""
        await asyncio.gather(*self._judging)

    async def _judge(self, hook: Hook, text: str, direction: Direction, who: Mapping[str, str]) -> Verdict:
        found: tuple[str, ...] = ()
        failure = ""
        try:
            async with asyncio.timeout(self._seconds):
                found = await hook(text, direction)
        except Exception as error:  # whatever it is, the text is not judged; its message may quote the text
            failure = str(error) if isinstance(error, HookError) else type(error).__name__
            self._say_failing(failure)
        blocks = self.mode == "block"
        verdict = Verdict(blocks and bool(found or failure), found, bool(failure))
        if found or failure:
            action = "blocked" if blocks else "let through"
            line = {"direction": direction, "categories": found, "failure": failure or None, "action": action}
            await self._note({"time": datetime.now(UTC).isoformat(timespec="seconds"), **who, **line})
        return verdict

    def _say_failing(self, failure: str) -> None:
        if not self._failed:  # said once; the log has the rest
            effect = "blocked" if self.mode == "block" else "let through"
            say(f"farthing: moderation fails ({failure}); text that is not judged is {effect}", sys.stderr)
        self._failed = True

    async def _note(self, line: dict[str, Any]) -> None:
        if self._log is None:
            return
        try:
            await asyncio.to_thread(append_lines, self._log, [line])
        except OSError as error:  # the verdict holds, logged or not
            say(one_line(f"farthing: {self._log} cannot be written ({error.strerror})"), sys.stderr)


class Screen:
    """One answer on its way out: what `push` and `flush` return may be sent.

    In the mode `block` text is held back to the end of its sentence, which is judged with what was sent before it;
    without such an end, for 500 characters.
    """

    def __init__(self, moderation: Moderation, *, key: str = "", model: str = "") -> None:
        self._moderation, self._who = moderation, {"key": key, "model": model}
        self._sent, self._held = "", ""

    async def push(self, piece: str) -> str:
        """The next text to send, possibly empty. Raises Blocked."""
        if self._moderation.mode == "off":
            return piece
        self._held += piece
        ended = _SENTENCE.match(self._held)
        end = ended.end() if ended else len(self._held) if len(self._held) >= _LONGEST else 0
        judged = await self._judged(end)
        return judged if self._moderation.mode == "block" else piece

    async def flush(self) -> str:
        """The rest, at the end of the answer. Raises Blocked."""
        judged = await self._judged(len(self._held))
        return judged if self._moderation.mode == "block" else ""

    async def _judged(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        if text:
            self._sent = (self._sent + text)[-_CONTEXT - len(text) :]
            verdict = await self._moderation.check(self._sent, "answer", **self._who)
            if verdict.blocked:
                raise Blocked(verdict)
        return text


class Policy(Strict):
    """What the operator puts before every conversation, and the answer to what is blocked (an error without one)."""

    system: Text
    refusal: Text | None = None

    def before(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with the policy as its system message, or in front of the one it has."""
        first, *rest = messages or [{}]
        if first.get("role") not in ("system", "developer"):
            return [{"role": "system", "content": self.system}, *messages]
        said = first.get("content")
        if isinstance(said, list):
            content: Any = [{"type": "text", "text": self.system}, *said]
        else:
            content = f"{self.system}\n\n{said or ''}".rstrip()
        return [{**first, "content": content}, *rest]


def read_policy(path: Path) -> Policy:
    """Read a policy: `system` and `refusal` from a .yaml or .yml file; any other file is the system message itself.

    Raises:
        UserError: if it cannot be read, or says nothing.
    """
    try:
        with open_ready(path) as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file with the policy") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a file with the policy") from None
    if len(text) > MAX_BYTES:
        raise UserError(f"{path} is larger than 1 MB; give a file with the policy")
    if path.suffix.lower() in (".yaml", ".yml"):
        return checked(Policy, parse_text(text, str(path)), str(path))
    if not text.strip():
        raise UserError(f"{path} is empty; write the system message into it")
    return Policy(system=text.strip())


def moderation(setting: str, log: Path | None = None, seconds: float = SECONDS) -> Moderation:
    """Moderation as an operator writes it: `off`, or a mode and a hook, as `block=module:function`.

    Raises:
        UserError: if it is written otherwise, the function cannot be imported or the log cannot be written.
    """
    mode, _, place = setting.partition("=")
    if setting == "off":
        return Moderation()
    if mode not in ("warn", "block") or not place:
        raise UserError(f"moderation is {setting!r}; write {_FORMS}")
    if log is not None:
        try:
            appending(log).close()
        except OSError as error:
            raise UserError(f"{log} cannot be written ({error.strerror}); give another file") from None
    if "://" in place:
        if not is_server(place):
            raise UserError(f"moderation: {place} names no server; write {_FORMS}")
        hook = classifier(place, seconds)
    else:
        hook = function_hook(_function(place))
    return Moderation(mode, hook, log=log, seconds=seconds)  # type: ignore[arg-type]


def function_hook(function: Callable[[str, Direction], Any]) -> Hook:
    """A hook that calls a function, or awaits one, in threads of its own.

    The function returns a category, a list of them, or whether it finds anything; None, False and an empty list pass.
    """
    calls: queue.SimpleQueue[tuple[Future[Any], str, Direction]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            future, text, direction = calls.get()
            if future.set_running_or_notify_cancel():  # nobody waits for it after its time
                try:
                    future.set_result(function(text, direction))
                except BaseException as error:  # SystemExit too: this thread is the hook's alone
                    future.set_exception(HookError(type(error).__name__))

    for _ in range(_THREADS):  # daemons: a function that never returns does not keep the process from ending
        threading.Thread(target=work, name="moderation", daemon=True).start()

    async def judge(text: str, direction: Direction) -> tuple[str, ...]:
        future: Future[Any] = Future()
        calls.put((future, text, direction))
        found = await asyncio.wrap_future(future)
        return _categories(await found if inspect.isawaitable(found) else found)

    return judge


def classifier(url: str, seconds: float = SECONDS) -> Hook:
    """A hook that asks a server as OpenAI's /v1/moderations; the key is FARTHING_MODERATION_KEY, if that is set."""
    import httpx

    key = os.environ.get(KEY)
    client = httpx.AsyncClient(timeout=seconds, headers={"Authorization": f"Bearer {key}"} if key else None)

    async def judge(text: str, direction: Direction) -> tuple[str, ...]:
        reply = await client.post(url, json={"input": text})
        if reply.status_code != httpx.codes.OK:
            raise HookError(f"HTTP {reply.status_code}")
        return _flagged(reply.json())

    return judge


def _function(place: str) -> Callable[[str, Direction], Any]:
    module, colon, name = place.rpartition(":")
    if not colon or not module or not name:
        raise UserError(f"moderation: {place} names no function; write {_FORMS}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the operator's own file, as `python -m` would find it
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever the operator's module raises
        said = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"moderation: {module} cannot be imported ({said})") from error
    if not callable(function):
        raise UserError(f"moderation: {module} has no function {name}")
    return function


def _categories(found: Any) -> tuple[str, ...]:
    """What a function returned, as categories."""
    if found is None or isinstance(found, bool):
        return ("flagged",) if found else ()
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list | tuple | set | frozenset):
        raise HookError(f"returned {type(found).__name__}")
    return tuple(one_line(str(name))[:_NAME] for name in names if name)


def _flagged(answer: Any) -> tuple[str, ...]:
    """The categories of a reply in the form of OpenAI's /v1/moderations."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or not results:
        raise HookError(_FORM)
    found: list[str] = []
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("flagged"), bool):
            raise HookError(_FORM)
        if result["flagged"]:
            categories = result.get("categories")
            named = categories.items() if isinstance(categories, dict) else ()
            found += [name for name, applies in named if applies is True] or ["flagged"]
    return _categories(found)
