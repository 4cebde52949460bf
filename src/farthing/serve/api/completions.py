"""/v1/completions: continuing plain texts and lists of token ids, with the prompt's own log-probabilities if wanted.

`echo` with `logprobs` scores a prompt, which is how evaluation harnesses ask for likelihoods.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from farthing.base.errors import UserError
from farthing.engine.sequence import Request
from farthing.serve.answers import Answers, Run, Usage, sampling_of
from farthing.serve.api import head
from farthing.serve.conversation import Delta, Outgoing
from farthing.serve.errors import ApiError
from farthing.serve.guide import Guide
from farthing.serve.keys import Caller
from farthing.serve.protocol import CompletionRequest
from farthing.serve.reader import Reader
from farthing.serve.served import Served, Spoken
from farthing.serve.worker import Update

MOST_PROMPTS = 128
DEFAULT_TOKENS = 16  # as OpenAI's


class Choice:
    """One continuation of one prompt.

    Attributes:
        fresh: text that no change has told yet; at first the echoed prompt.
    """

    def __init__(self, served: Spoken, stops: Sequence[str], fresh: str) -> None:
        self.fresh, self._served = fresh, served
        self._reader = Reader(served.tokenizer, stops, splits=False)
        self._end = 0  # characters of the tokens so far
        self.tokens = 0
        self._scores = _no_scores()

    def score(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[Sequence[tuple[int, float]]],
    ) -> None:
        """Note tokens with their log-probabilities; `top` holds the likeliest of each place, if wanted."""
        text_of, scores = self._served.tokenizer.token_text, self._scores
        for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            text = text_of(token)
            best = {text_of(other): score for other, score in top[place]} if top else {}
            scores["tokens"].append(text)
            scores["token_logprobs"].append(logprob)
            scores["top_logprobs"].append(None if logprob is None else {**best, text: logprob})
            scores["text_offset"].append(self._end)
            self._end += len(text)
            self.tokens += 1

    def take(self, index: int, ids: Sequence[int], finish_reason: str | None, scored: bool) -> dict[str, Any]:
        """Read new tokens; what has changed, in OpenAI's form."""
        self.fresh += self._reader.push(ids).text
        if finish_reason is not None:
            self.fresh += self._reader.finish().text
        text, self.fresh = self.fresh, ""
        scores, self._scores = self._scores, _no_scores()
        return {
            "index": index,
            "text": text,
            "logprobs": scores if scored else None,
            "finish_reason": finish_reason,
        }


def _no_scores() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class Completions:
    """One request for completions: its prompts run side by side. `prepare` comes first."""

    def __init__(self, answers: Answers, served: Spoken, body: CompletionRequest, caller: Caller) -> None:
        self.answers, self.served, self.body, self.caller = answers, served, body, caller
        self.each = body.n or 1

    async def prepare(self) -> None:
        """Read the prompts. Raises ApiError for what the model cannot do, and as `Answers.admit`."""
        body, served = self.body, self.served
        if len(body.prompts) > MOST_PROMPTS:
            raise ApiError(
                f"prompt: takes up to {MOST_PROMPTS} prompts, not {len(body.prompts)}", param="prompt"
            )
        if body.suffix and not self.answers.lenient:
            raise ApiError("suffix: cannot be honoured; the models here continue texts", param="suffix")
        self.answers.admit(self.caller, len(body.prompts))
        prompts = await asyncio.to_thread(lambda: [self._ids(prompt) for prompt in body.prompts])
        for ids in prompts:
            await self.answers.check_prompt(served.tokenizer.decode(ids), served, self.caller)
        wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        for ids in prompts:
            served.room(ids, wanted, "prompt")
        self._silent = wanted == 0
        sampling = sampling_of(body, served, max(1, wanted), body.logprobs or 0)
        guide = await asyncio.to_thread(self._guided)
        scored = bool(body.echo) and body.logprobs is not None
        self.runs = [
            Run(
                served,
                Request(
                    ids,
                    sampling,
                    self.each,
                    first_sample=number * self.each,
                    owner=self.caller.name,
                    score_prompt=scored,
                    constrain=guide,
                ),
                self.caller,
            )
            for number, ids in enumerate(prompts)
        ]
        self.choices = [
            Choice(served, body.stops, self._echoed(number))
            for number in range(len(prompts))
            for _ in range(self.each)
        ]
        self._outgoing = [Outgoing(self.answers, served, self.caller) for _ in self.choices]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(prompt, str):
            try:
                ids = (
                    tokenizer.encode(prompt) if self.body.add_special_tokens else tokenizer.raw_encode(prompt)
                )
            except UserError as error:
                raise ApiError(f"prompt: {error}", param="prompt") from None
            start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
            return ids or ([start] if start is not None else [])
        self.served.check_tokens(prompt, "prompt")
        if not prompt:
            raise ApiError("prompt: is an empty list; give at least one token", param="prompt")
        return prompt

    def _guided(self) -> Callable[[], Guide] | None:
        served = self.served
        assert isinstance(served, Served)
        grammar = served.grammars.of_format(self.body.response_format)
        return (
            None if grammar is None else lambda: Guide(served.tokenizer, served.vocab_size, grammar=grammar)
        )

    def _echoed(self, number: int) -> str:
        if not self.body.echo:
            return ""
        given = self.body.prompts[number]
        return given if isinstance(given, str) else self.served.tokenizer.decode(given)

    @property
    def usage(self) -> Usage:
        """Of all prompts together."""
        return sum((run.usage for run in self.runs), Usage())

    async def changes(self) -> AsyncGenerator[dict[str, Any], None]:
        """Run all prompts; yields each change of a choice, in OpenAI's form."""
        found: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

        async def read(number: int) -> None:
            try:
                mine = self._outgoing[number * self.each : (number + 1) * self.each]
                async with aclosing(self._continued(number)) as changes:
                    async for change in changes:
                        found.put_nowait(await self._screened(change))
                        if all(one.blocked for one in mine):
                            break
                found.put_nowait(None)
            except Exception as error:
                found.put_nowait(error)

        tasks = [asyncio.create_task(read(number)) for number in range(len(self.runs))]
        left = len(tasks)
        try:
            while left:
                change = await found.get()
                if isinstance(change, Exception):
                    raise change
                left -= change is None
                if change is not None:
                    yield change
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _continued(self, number: int) -> AsyncGenerator[dict[str, Any], None]:
        """Run one prompt."""
        async with aclosing(self.answers.updates(self.runs[number])) as batches:
            async for batch in batches:
                for update in batch:
                    yield self._change(number, update)

    async def _screened(self, change: dict[str, Any]) -> dict[str, Any]:
        """The part of a change that may be sent now; what is blocked ends the choice."""
        delta = Delta(change["index"], text=change["text"], finish_reason=change["finish_reason"])
        outgoing = self._outgoing[change["index"]]
        delta = await outgoing.screened(delta)
        scores = change["logprobs"]
        if self.answers.moderation.mode == "block" and scores is not None:  # they spell the text
            scores = _no_scores()
        return {**change, "text": delta.text, "logprobs": scores, "finish_reason": delta.finish_reason}

    def _change(self, number: int, update: Update) -> dict[str, Any]:
        index, run = number * self.each + update.sample, self.runs[number]
        choice = self.choices[index]
        if run.request.score_prompt and not choice.tokens:
            # OpenAI's types have no word for the first token, which nothing foretells; strict clients break on null.
            first = [0.0] if self.answers.lenient else run.prompt_logprobs[:1]
            choice.score(run.request.ids, [*first, *run.prompt_logprobs[1:]], run.prompt_top)
        ids = () if self._silent else update.ids
        choice.score(ids, update.logprobs[: len(ids)], update.top[: len(ids)])
        return choice.take(index, ids, update.finish_reason, self.body.logprobs is not None)


async def chunks(completions: Completions, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
    """Yield `text_completion` objects of a stream."""
    start = head("cmpl", "text_completion", completions.served.name)
    async with aclosing(completions.changes()) as changes:
        async for change in changes:
            yield {**start, "choices": [change], **({"usage": None} if include_usage else {})}
    if include_usage:
        yield {**start, "choices": [], "usage": completions.usage.body}


async def completion(completions: Completions) -> dict[str, Any]:
    """The whole `text_completion`."""
    whole: dict[int, dict[str, Any]] = {}
    async with aclosing(completions.changes()) as changes:
        async for change in changes:
            mine = whole.setdefault(change["index"], change)
            if mine is not change:
                mine["text"] += change["text"]
                mine["finish_reason"] = change["finish_reason"]
                for name, scores in (mine["logprobs"] or {}).items():
                    scores += change["logprobs"][name]
    choices = [whole[index] for index in sorted(whole)]
    return {
        **head("cmpl", "text_completion", completions.served.name),
        "choices": choices,
        "usage": completions.usage.body,
    }
