"""`judge`: a model at an OpenAI-compatible server, or of this process, gives a score, within a budget.

The score is read strictly: one line `Score: N`, the reply's last, from 0 to the best; of any other reply none is read,
and the answer earns nothing. Calls that fail are tried again; one that goes on failing is an error, not a reward of 0.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from farthing.base.errors import UserError
from farthing.cost.meter import Span
from farthing.recipe.rewards import Judge
from farthing.tasks.item import Item
from farthing.tasks.rewards.models import Models, Reply
from farthing.tasks.rewards.part import Part

_SECONDS = 120.0  # for a reply
_LONGEST = 1_000_000  # bytes of a reply
_MOST_WAITING = 60.0  # seconds between tries
_FIELD = re.compile(r"\{(question|answer|completion)\}")
_SCORE = re.compile(
    r"^[ \t*]*score[ \t*]*:[ \t*]*([0-9]+(?:\.[0-9]+)?)[ \t.*]*$", re.IGNORECASE | re.MULTILINE
)
_NO_TRY = (400, 401, 402, 403, 404, 405, 413, 422)  # a further try would get the same


class Failed(Exception):
    """A call that gave nothing, in one line."""


class Judges:
    """Every judge of a run: what it said, and what that cost."""

    def __init__(self, models: Models | None = None) -> None:
        self._models = models
        self.calls, self.tokens, self.usd = 0, 0, 0.0
        self._said: dict[tuple[str, str, str], str] = {}
        self._lock = threading.Lock()

    def parts(self, settings: Judge, pairs: Sequence[tuple[Item, str]], span: Span) -> list[Part]:
        """The judge's parts of the verdicts on completions; what they take is added to the span.

        Raises UserError when the budget is spent.
        """
        prompts = [filled(settings.prompt, item, text) for item, text in pairs]
        if settings.url is None:
            return self._here(settings, prompts, span)
        new = [p for p in dict.fromkeys(prompts) if self._key(settings, p) not in self._said]
        with ThreadPoolExecutor(settings.at_once) as threads:
            errors = dict(
                zip(new, threads.map(lambda prompt: self._ask(settings, prompt, span), new), strict=True)
            )
        return [
            _failed(why)
            if (why := errors.get(prompt))
            else scored(self._said[self._key(settings, prompt)], settings)
            for prompt in prompts
        ]

    def _here(self, settings: Judge, prompts: Sequence[str], span: Span) -> list[Part]:
        """Ask the model of this process. Replies are not kept: a continued run then asks as one never interrupted does,
        and which prompts are in a batch may change a reply's last bits."""
        assert self._models is not None, "a pool that pays by models is given them"
        said: dict[str, Reply] = {}
        new = list(dict.fromkeys(prompts))
        for start in range(0, len(new), settings.at_once):
            group = new[start : start + settings.at_once]
            for _ in group:
                self._within(settings)
            replies = self._models.replies(settings.model, group, settings.max_new_tokens, span)
            self.tokens += sum(reply.tokens for reply in replies)
            said |= zip(group, replies, strict=True)
        return [
            _failed(why) if (why := said[prompt].error) else scored(said[prompt].text, settings)
            for prompt in prompts
        ]

    def _key(self, settings: Judge, prompt: str) -> tuple[str, str, str]:
        return str(settings.url), str(settings.model), prompt

    def _ask(self, settings: Judge, prompt: str, span: Span) -> str | None:
        """Ask one thing and keep the reply; the line about what went wrong, if anything did."""
        why = ""
        for number in range(1 + settings.retries):
            self._within(settings)
            try:
                reply = _call(settings, prompt)
            except Failed as error:
                why, wait = str(error.args[0]), error.args[1]
                if wait is None:
                    return why
                time.sleep(0.0 if number == settings.retries else min(_MOST_WAITING, max(wait, 2.0**number)))
                continue
            try:
                text = str(reply["choices"][0]["message"]["content"] or "")
            except (KeyError, IndexError, TypeError):
                return f"{settings.url} did not reply as an OpenAI-compatible server does"
            self._book(settings, reply.get("usage"), span)
            self._said[self._key(settings, prompt)] = text
            return None
        return why

    def _within(self, settings: Judge) -> None:
        with self._lock:
            for name, spent, most in (
                ("calls", self.calls, settings.calls),
                ("tokens", self.tokens, settings.tokens),
                ("usd", self.usd, settings.usd),
            ):
                if most is not None and spent >= most:
                    raise UserError(
                        f"judge: its budget of {most:g} {name} is spent; raise {name}, and run again"
                    )
            self.calls += 1

    def _book(self, settings: Judge, usage: Any, span: Span) -> None:
        numbers = usage if isinstance(usage, dict) else {}
        read, written = (
            value if isinstance(value := numbers.get(name), int) and 0 <= value < 10**9 else 0
            for name in ("prompt_tokens", "completion_tokens")
        )
        with self._lock:
            self.tokens += read + written
            usd = (read * settings.usd_per_million_in + written * settings.usd_per_million_out) / 1e6
            self.usd += usd
            span.tokens_in, span.tokens_out = span.tokens_in + read, span.tokens_out + written
            span.usd_paid += usd


def _failed(why: str) -> Part:
    return Part("error", error=f"judge: {why}")


def filled(prompt: str, item: Item, text: str) -> str:
    """The prompt with its fields filled in, once: what a field holds is not looked into."""
    values = {"question": item.question, "answer": item.answer, "completion": text}
    return _FIELD.sub(lambda field: values[field[1]], prompt)


def scored(reply: str, settings: Judge) -> Part:
    """The part that a reply says."""
    reply = reply.rpartition("</think>")[2].strip()
    found = _SCORE.findall(reply)
    last = _SCORE.fullmatch(reply.rpartition("\n")[2])
    if len(found) != 1 or last is None or float(last[1]) > settings.best:
        return Part("unparsed")
    reward = float(last[1]) / settings.best
    return Part("right" if reward >= settings.right_from else "wrong", last[1], reward)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the key goes to the server that the recipe names, and to no other."""
        return


def _call(settings: Judge, prompt: str) -> Any:
    """One call. Raises Failed(line, seconds to wait before another try, None for no other)."""
    body = {
        "model": settings.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": settings.max_new_tokens,
    }
    headers = {"Content-Type": "application/json", "User-Agent": "farthing"}
    if key := os.environ.get(settings.key):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{str(settings.url).rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_SECONDS) as response:
            return json.loads(response.read(_LONGEST))
    except urllib.error.HTTPError as error:
        hint = f"; is {settings.key} set?" if error.code == 401 else ""
        wait = _seconds(error.headers.get("Retry-After")) if error.code not in _NO_TRY else None
        raise Failed(f"{url} says {error.code} {error.reason}{hint}", wait) from None
    except (OSError, http.client.HTTPException) as error:
        said = getattr(error, "reason", None) or error
        raise Failed(f"{url} cannot be reached ({' '.join(str(said).split())})", 0.0) from None
    except (ValueError, RecursionError):
        raise Failed(f"{url} did not reply in JSON", 0.0) from None


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0
