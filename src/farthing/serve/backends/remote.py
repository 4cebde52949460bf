"""A model that another engine runs: requests are relayed to its server, and told of as if they were ours.

What an answer costs is measured here: its share of the wall clock, divided equally among the requests that run. Tokens
are those that the engine counts, or those of the text where it counts none.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx

from farthing.cost.flops import forward_flops
from farthing.cost.meter import Span
from farthing.data.tokenizer import Tokenizer
from farthing.serve.answers import Answers, Run
from farthing.serve.api.completions import Completions
from farthing.serve.backends.process import Process
from farthing.serve.conversation import Conversation, Delta, Entry
from farthing.serve.errors import ApiError
from farthing.serve.served import Spoken
from farthing.serve.thinking import Splitter
from farthing.serve.worker import Power, Share
from farthing.weights.folder import read_config
from farthing.weights.layouts import decoder_config


class Clock:
    """Divides wall clock and energy among the requests that run at other engines."""

    def __init__(self, joules: Callable[[], float]) -> None:
        self._power, self._at, self._busy = Power(joules), time.perf_counter(), 0.0
        self._running: list[Share] = []

    def begin(self) -> Share:
        """A request begins."""
        self.settle()
        share = Share()
        self._running.append(share)
        return share

    def end(self, share: Share) -> None:
        """A request ends."""
        self.settle()
        self._running = [one for one in self._running if one is not share]

    def settle(self) -> None:
        """Divide the time since the last call."""
        now = time.perf_counter()
        seconds, self._at = now - self._at, now
        if not self._running:
            return
        watts, count = self._power.watts(), len(self._running)
        self._busy += seconds
        for share in self._running:
            share.seconds += seconds / count
            share.joules += seconds / count * watts

    def take_busy_seconds(self) -> float:
        """Seconds in which any request ran since the last call."""
        self.settle()
        seconds, self._busy = self._busy, 0.0
        return seconds


class Remote(Spoken):
    """A model of a folder, run by the engine of `process`."""

    def __init__(self, name: str, folder: Path, process: Process, clock: Clock, context: int | None) -> None:
        self._hf = read_config(folder)
        config = decoder_config(self._hf)
        most = min(config.max_positions, context or config.max_positions)
        super().__init__(name, folder, Tokenizer(folder), most, config.vocab_size)
        self.process, self.clock = process, clock
        self._done = Span("serve", "generate", None, 0.0)

    def book(self, span: Span) -> None:
        done, self._done = self._done, Span("serve", "generate", None, 0.0)
        span.tokens_in += done.tokens_in
        span.tokens_out += done.tokens_out
        span.flops += done.flops

    async def answer(
        self, answers: Answers, run: Run, path: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks with which the engine answers; closing the iterator cancels the answer there.

        Raises:
            ApiError: what the engine says of the request; 502 or 503 if it fails, and 504 after `most_seconds`.
        """
        sampling = run.request.sampling
        usual = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        usual |= dict.fromkeys(
            ("repetition_penalty", "repeat_penalty"), sampling.repetition_penalty
        )  # vLLM, llama.cpp
        body = {
            **usual,
            **body,
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        until = asyncio.get_running_loop().time() + answers.most_seconds
        share, texts, counted = self.clock.begin(), dict[int, str](), False
        with answers.counted(run):
            events = self._events(path, body)
            try:
                while True:
                    left = until - asyncio.get_running_loop().time()
                    chunk = await asyncio.wait_for(anext(events, None), max(0.0, left))
                    if chunk is None:
                        break
                    answers.arrived(run)
                    counted = _count(run, chunk) or counted
                    for choice in chunk.get("choices") or ():
                        texts[choice.get("index", 0)] = texts.get(choice.get("index", 0), "") + _text(choice)
                    self.clock.settle()
                    answers.charge(run, share)
                    yield chunk
            finally:
                await events.aclose()
                self.clock.end(share)
                answers.charge(run, share)
                if not counted:
                    run.usage.completion_tokens = sum(self._tokens(text) for text in texts.values())
                self._note(run)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if not self.process.ready:
            raise _away(self)
        try:
            async with self.process.client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    raise _refused(answer.status_code, await answer.aread(), self)
                async for line in answer.aiter_lines():
                    kind, _, data = line.partition(":")
                    if kind != "data" or data.strip() == "[DONE]":
                        continue
                    found = json.loads(data)
                    if "error" in found:
                        raise _refused(500, data.encode(), self)
                    yield found
        except (httpx.HTTPError, ValueError):
            raise _away(self) from None

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.raw_encode(text))

    def _note(self, run: Run) -> None:
        """Count a request for the books: tokens through the network, attention within all of the context."""
        usage, each = run.usage, run.request.samples
        read, cached, written = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
        prompt_pairs = (read * (read + 1) - cached * (cached + 1)) / 2
        answer_pairs = written * read + written * (written / each + 1) / 2
        self._done.tokens_in += read
        self._done.tokens_out += written
        self._done.flops += forward_flops(self._hf, read - cached + written, prompt_pairs, written)
        self._done.flops += forward_flops(self._hf, 0, answer_pairs, 0, absorbed=True)


class RelayedConversation(Conversation):
    """A conversation with a model that another engine runs; it renders, constrains and samples there."""

    def _guided(self) -> None:
        if self.body.thinking_budget is not None:
            said = "thinking_budget: is not kept by the engine behind this server"
            raise ApiError(said, param="thinking_budget")

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        remote, run = self.served, self.run
        assert isinstance(remote, Remote)
        if self._silent:
            for index in range(self.choices):
                yield Delta(index, finish_reason="length")
            return
        choices = [_Choice(index, self._prompt.opened) for index in range(self.choices)]
        chunks = remote.answer(self.answers, run, "/v1/chat/completions", self._asked())
        try:
            async for chunk in chunks:
                for found in chunk.get("choices") or ():
                    choice = choices[found.get("index", 0)]
                    delta = choice.read(found)
                    if delta.finish_reason:
                        run.reasons.append(delta.finish_reason)
                    delta = await self._outgoing[choice.index].screened(delta)
                    if delta.says:
                        yield delta
                if all(one.blocked for one in self._outgoing):
                    return
        finally:
            await chunks.aclose()
            if not run.usage.reasoning_tokens:
                thoughts = (choice.thoughts for choice in choices)
                run.usage.reasoning_tokens = sum(len(remote.tokenizer.raw_encode(text)) for text in thoughts)

    def _asked(self) -> dict[str, Any]:
        """The body as the engine reads it; the policy stands in it as in our own prompts."""
        given = self.body.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)
        if self.answers.policy is not None:
            given["messages"] = self.answers.policy.before(given["messages"])
        given.pop("max_completion_tokens", None)
        given["max_tokens"] = self.run.request.sampling.max_new_tokens
        return given


class RelayedCompletions(Completions):
    """Texts that a model which another engine runs continues."""

    def _guided(self) -> None:
        return None  # the engine does it

    async def _continued(self, number: int) -> AsyncGenerator[dict[str, Any], None]:
        remote, run = self.served, self.runs[number]
        assert isinstance(remote, Remote)
        given = self.body.model_dump(by_alias=True, exclude_none=True, exclude_unset=True)
        most = 0 if self._silent else run.request.sampling.max_new_tokens
        given |= {"prompt": self.body.prompts[number], "max_tokens": most}
        chunks = remote.answer(self.answers, run, "/v1/completions", given)
        try:
            async for chunk in chunks:
                for found in chunk.get("choices") or ():
                    if found.get("finish_reason"):
                        run.reasons.append(found["finish_reason"])
                    yield {
                        "index": number * self.each + found.get("index", 0),
                        "text": found.get("text") or "",
                        "logprobs": found.get("logprobs"),
                        "finish_reason": found.get("finish_reason"),
                    }
        finally:
            await chunks.aclose()


class _Choice:
    """One choice of an engine's answer: thinking is split off where the engine has not done so, and calls of tools,
    which come in pieces, are told whole at the end."""

    def __init__(self, index: int, opened: bool) -> None:
        self.index, self.thoughts = index, ""
        self._splitter, self._separate = Splitter(opened), False
        self._calls: dict[int, Entry] = {}

    def read(self, found: dict[str, Any]) -> Delta:
        """What a chunk's choice adds."""
        said = found.get("delta") or {}
        thinking, content = (
            said.get("reasoning_content") or said.get("reasoning") or "",
            said.get("content") or "",
        )
        self._separate = self._separate or bool(thinking)  # by the engine
        pieces = [(True, thinking), *([(False, content)] if self._separate else self._splitter.push(content))]
        for piece in said.get("tool_calls") or ():
            self._add(piece)
        delta = Delta(self.index, finish_reason=found.get("finish_reason"))
        if delta.finish_reason:
            pieces += self._splitter.flush()
            delta.calls = [self._calls[place] for place in sorted(self._calls)]
        delta.thinking = "".join(text for is_thinking, text in pieces if is_thinking)
        delta.text = "".join(text for is_thinking, text in pieces if not is_thinking)
        delta.logprobs = (found.get("logprobs") or {}).get("content") or []
        self.thoughts += delta.thinking
        return delta

    def _add(self, piece: dict[str, Any]) -> None:
        place, function = piece.get("index", 0), piece.get("function") or {}
        call = self._calls.setdefault(
            place, {"index": place, "id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = call["id"] or piece.get("id")
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _text(choice: dict[str, Any]) -> str:
    """All text of a chunk's choice, of either operation."""
    said = choice.get("delta") or {}
    thinking = said.get("reasoning_content") or said.get("reasoning") or ""
    return thinking + (said.get("content") or "") + (choice.get("text") or "")


def _count(run: Run, chunk: dict[str, Any]) -> bool:
    """Take over the engine's own count; False if the chunk has none."""
    if not isinstance(used := chunk.get("usage"), dict):
        return False
    run.usage.prompt_tokens = used.get("prompt_tokens") or run.usage.prompt_tokens
    run.usage.completion_tokens = used.get("completion_tokens") or run.usage.completion_tokens
    run.usage.cached_tokens = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    run.usage.reasoning_tokens = (used.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return True


def _refused(status: int, said: bytes, remote: Remote) -> ApiError:
    """An engine's error in OpenAI's form; a fault of the engine's own is 502."""
    try:
        found = json.loads(said)
    except ValueError:
        found = {}
    error = found.get("error", found) if isinstance(found, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = str(error.get("message") or error.get("detail") or "the engine says no more")[:1000]
    if status >= 500:
        return ApiError(f"the engine of {remote.name} failed: {message}", status=502, kind="server_error")
    code = error.get("code")
    return ApiError(
        message, status=status, param=error.get("param"), code=code if isinstance(code, str) else None
    )


def _away(remote: Remote) -> ApiError:
    """The engine does not answer."""
    if remote.process.ready:
        return ApiError(f"the engine of {remote.name} broke off its answer", status=502, kind="server_error")
    return ApiError(
        f"the engine of {remote.name} has ended; it is started again",
        status=503,
        kind="overloaded_error",
        code="engine_away",
        retry_after=5,
    )
