"""Answering a conversation: thinking, text and calls of tools, in pieces, for every choice."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from farthing.engine.sequence import Request
from farthing.serve.answers import Answers, Run, Usage, sampling_of
from farthing.serve.guide import Guide
from farthing.serve.keys import Caller
from farthing.serve.protocol import ChatRequest
from farthing.serve.reader import Read, Reader
from farthing.serve.safety import Blocked, Screen
from farthing.serve.served import Served, Spoken
from farthing.serve.worker import Update

Entry = dict[str, Any]  # a token with its log-probability, in OpenAI's form


@dataclass
class Delta:
    """A piece of one choice."""

    index: int
    thinking: str = ""
    text: str = ""
    calls: list[Entry] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def says(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.thinking or self.text or self.calls or self.logprobs or self.finish_reason)


class Conversation:
    """One request for chat, from its body to its deltas.

    `prepare` comes first.
    """

    def __init__(self, answers: Answers, served: Spoken, body: ChatRequest, caller: Caller) -> None:
        self.answers, self.served, self.body, self.caller = answers, served, body, caller
        self.choices = body.n or 1
        self._called = [0] * self.choices
        self._outgoing = [Outgoing(answers, served, caller) for _ in range(self.choices)]

    async def prepare(self) -> None:
        """Render the prompt and compile the grammars, beside the event loop.

        Raises:
            ApiError: for what the model or its template cannot do, and as `Answers.admit`.
        """
        body, served = self.body, self.served
        self.answers.admit(self.caller)
        await self.answers.check_prompt(body.said, served, self.caller)
        self._prompt = await asyncio.to_thread(served.chat_prompt, body, self.answers.policy)
        most = served.room(self._prompt.ids, body.most_tokens, "messages")
        self._silent = most == 0
        sampling = sampling_of(body, served, max(1, most), body.top_logprobs or 0)
        guide = await asyncio.to_thread(self._guided)
        request = Request(self._prompt.ids, sampling, self.choices, owner=self.caller.name, constrain=guide)
        self.run = Run(served, request, self.caller)
        form = served.form if body.callable_tools else None
        self._readers = [
            Reader(served.tokenizer, body.stops, opened=self._prompt.opened, form=form)
            for _ in range(self.choices)
        ]

    @property
    def usage(self) -> Usage:
        """What the answer has taken so far."""
        return self.run.usage

    def _guided(self) -> Callable[[], Guide] | None:
        """What makes a guide for each choice; None if every answer is free."""
        served, body = self.served, self.body
        assert isinstance(served, Served)
        tools, grammar, call = body.callable_tools, None, None
        if tools:
            named = body.must_call
            chosen = [tool for tool in tools if named in (True, False, tool.name)]
            lark = served.form.grammar(chosen, served.special, opening=bool(named))
            compiled = served.grammars.compiled(lark, "tools")
            grammar, call = (compiled, None) if named else (None, (served.form.open, compiled))
        if grammar is None:
            grammar = served.grammars.of_format(body.response_format)
        budget = body.thinking_budget
        if grammar is None and call is None and budget is None:
            return None
        thinks = served.thinks if grammar is not None or budget is not None else None
        return lambda: Guide(
            served.tokenizer,
            served.vocab_size,
            opened=self._prompt.opened,
            thinks=thinks,
            budget=budget,
            grammar=grammar,
            call=call,
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the answer's pieces; closing the iterator cancels the answer."""
        async with aclosing(self.answers.updates(self.run)) as updates:
            async for found in updates:
                for update in found:
                    delta = await self._outgoing[update.sample].screened(self._delta(update))
                    if delta.says:
                        yield delta
                if all(one.blocked for one in self._outgoing):
                    return

    def _delta(self, update: Update) -> Delta:
        if self._silent:
            self.usage.completion_tokens = 0
            return Delta(update.sample, finish_reason="length")
        reader = self._readers[update.sample]
        thought = reader.thought
        reads = [reader.push(update.ids)]
        if update.finish_reason is not None:
            reads.append(reader.finish())
        self.usage.reasoning_tokens += reader.thought - thought
        delta = Delta(update.sample)
        for read in reads:
            self._add(delta, read)
        if self.body.logprobs:
            delta.logprobs = [
                self._entry(update, place) for place in range(len(update.ids) - self._ends(update))
            ]
        if update.finish_reason is not None:
            called = self._called[update.sample] and update.finish_reason == "stop"
            delta.finish_reason = "tool_calls" if called else update.finish_reason
        return delta

    def _ends(self, update: Update) -> bool:
        """Whether the last token only ends the answer, and is no part of its text."""
        stops = self.served.tokenizer.stop_ids | self.run.request.sampling.stop_ids
        return update.finish_reason == "stop" and update.ids[-1:] != [] and update.ids[-1] in stops

    def _add(self, delta: Delta, read: Read) -> None:
        delta.thinking += read.thinking
        delta.text += read.text
        for name, arguments in read.calls:
            place = self._called[delta.index]
            if place and self.body.parallel_tool_calls is False:
                continue
            self._called[delta.index] += 1
            delta.calls.append(
                {
                    "index": place,
                    "id": f"call_{secrets.token_hex(12)}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )

    def _entry(self, update: Update, place: int) -> Entry:
        top = update.top[place] if update.top else []
        return {
            **token_entry(self.served, update.ids[place], update.logprobs[place]),
            "top_logprobs": [token_entry(self.served, token, logprob) for token, logprob in top],
        }


class Outgoing:
    """One choice on its way out, past the moderation.

    Attributes:
        blocked: nothing more may be sent.
    """

    def __init__(self, answers: Answers, served: Spoken, caller: Caller) -> None:
        self._answers, self._who = answers, {"key": caller.name, "model": served.name}
        self._thinking, self._text = (Screen(answers.moderation, **self._who) for _ in range(2))
        self._logprobs: list[Entry] = []  # they spell the text, so they wait for its verdict
        self.blocked = False

    async def screened(self, delta: Delta) -> Delta:
        """The part of a delta that may be sent now."""
        if self._answers.moderation.mode == "off":
            return delta
        if self.blocked:
            return Delta(delta.index)
        try:
            return await self._judged(delta)
        except Blocked:
            self.blocked = True
            policy = self._answers.policy
            refusal = (policy.refusal if policy is not None else None) or ""
            return Delta(delta.index, text=refusal, finish_reason="content_filter")

    async def _judged(self, delta: Delta) -> Delta:
        thinking = await self._thinking.push(delta.thinking)
        if delta.text or delta.calls or delta.finish_reason:
            thinking += await self._thinking.flush()
        text = await self._text.push(delta.text)
        for call in delta.calls:
            verdict = await self._answers.moderation.check(
                call["function"]["arguments"], "answer", **self._who
            )
            if verdict.blocked:
                raise Blocked(verdict)
        self._logprobs += delta.logprobs
        if delta.finish_reason:
            text += await self._text.flush()
        waits = self._answers.moderation.mode == "block" and not delta.finish_reason
        entries, self._logprobs = ([], self._logprobs) if waits else (self._logprobs, [])
        return Delta(delta.index, thinking, text, delta.calls, entries, delta.finish_reason)


def token_entry(served: Spoken, token: int, logprob: float) -> Entry:
    """A token's text, bytes and log-probability, in OpenAI's form."""
    text = served.tokenizer.token_text(token)
    return {
        "token": text,
        "logprob": max(logprob, -9999.0),
        "bytes": list(served.tokenizer.token_bytes(token)),
    }
