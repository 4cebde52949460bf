"""From a request to an answer that comes in pieces: what chat, completions, responses and the page have in common."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from farthing.base.errors import UserError
from farthing.engine.sampling import Sampling
from farthing.engine.sequence import Request
from farthing.serve.errors import ApiError, too_long
from farthing.serve.guide import Guide
from farthing.serve.keys import Caller
from farthing.serve.protocol import SamplingFields
from farthing.serve.safety import Moderation, Policy
from farthing.serve.served import Served, Spoken
from farthing.serve.worker import EngineFailed, Generation, Share, Update


@dataclass
class Usage:
    """What an answer took: tokens, and its share of the machine."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: mine + getattr(other, name) for name, mine in vars(self).items()})

    @property
    def body(self) -> dict[str, Any]:
        """The usage in OpenAI's form, with `cost` beside it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "cost": {
                "usd": round(self.usd, 9),
                "joules": round(self.joules, 4),
                "seconds": round(self.seconds, 5),
            },
        }


def sampling_of(body: SamplingFields, served: Spoken, tokens: int, top: int) -> Sampling:
    """Sampling parameters of a request: its own, else the model's recommended ones, else OpenAI's.

    Args:
        tokens: the longest answer.
        top: alternatives to record for each token.

    Raises:
        ApiError: for a token that the model does not have.
    """

    def value(name: str, otherwise: float) -> float:
        own = getattr(body, name)
        return served.defaults.get(name, otherwise) if own is None else own

    stops = body.stop_token_ids or []
    served.check_tokens(stops, "stop_token_ids")
    try:
        return Sampling(
            max_new_tokens=tokens,
            temperature=value("temperature", 1.0),
            top_p=min(1.0, value("top_p", 1.0)) or 1.0,
            top_k=max(0, int(value("top_k", 0))),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=_bias(body.logit_bias or {}, served),
            top_logprobs=top,
            ignore_eos=bool(body.ignore_eos),
            stop=body.stops,
            stop_ids=frozenset(stops),
            seed=secrets.randbits(62) if body.seed is None else body.seed % 2**64,
        )
    except UserError as error:
        raise ApiError(str(error), param=str(error).split()[0]) from None


def _bias(given: dict[str, float], served: Spoken) -> tuple[tuple[int, float], ...]:
    """Biases by token; a key that is no number is a text, whose tokens are meant (as llama.cpp's server has it)."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        if key.isascii() and key.isdigit():
            if len(key) > 9 or int(key) >= served.vocab_size:
                raise ApiError(f"logit_bias: {key[:20]} is not a token of {served.name}", param="logit_bias")
            found[int(key)] = bias
        else:
            try:
                found.update(dict.fromkeys(served.tokenizer.raw_encode(key), bias))
            except UserError as error:
                raise ApiError(f"logit_bias: {error}", param="logit_bias") from None
    return tuple(found.items())


@dataclass
class Run:
    """One request to an engine, and what has become of it.

    Attributes:
        asked, first, last: when it came, and when its first and latest tokens did, by `time.perf_counter`.
        prompt_logprobs, prompt_top: of the prompt's tokens, if the request asks for them.
    """

    served: Spoken
    request: Request
    caller: Caller
    usage: Usage = field(init=False)
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    reasons: list[str] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.usage = Usage(len(self.request.ids))


class Answers:
    """Starts requests on the engines, bounds them, and accounts for them.

    Args:
        submit, cancel: the worker's.
        most_waiting: requests that may wait for their first token before more are turned away.
        usd_per_second: price of the machine.
        told: hears of each request that has ended; one that was cut short lacks finish reasons.
        moderation, policy: what may come in and go out, and what stands before every conversation.
        lenient: answer also what names a model or a text that is not here, as tests of clients want it.
    """

    def __init__(
        self,
        submit: Callable[[Any, Request], Generation],
        cancel: Callable[[Generation], None],
        *,
        most_waiting: int = 256,
        most_seconds: float = 600.0,
        usd_per_second: float = 0.0,
        told: Callable[[Run], None] = lambda _: None,
        moderation: Moderation | None = None,
        policy: Policy | None = None,
        lenient: bool = False,
    ) -> None:
        self._submit, self._cancel = submit, cancel
        self._most_waiting, self.most_seconds = most_waiting, most_seconds
        self._usd_per_second, self._told, self.lenient = usd_per_second, told, lenient
        self.moderation, self.policy = moderation or Moderation(), policy
        self.unanswered = 0  # requests without a first token
        self._preparing = 0
        self.open = 0

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request while it gets ready for the engine."""
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def admit(self, caller: Caller, requests: int = 1) -> None:
        """Count a request, which is being prepared, against its caller's limits and the queue's bound.

        Raises:
            ApiError: 429 or 503.
        """
        waiting = self.unanswered + self._preparing - 1
        if waiting + requests > self._most_waiting:
            raise ApiError(
                f"{waiting} requests wait already; ask again later",
                status=503,
                kind="overloaded_error",
                code="queue_full",
                retry_after=5,
            )
        caller.admit()

    async def check_prompt(self, text: str, served: Spoken, caller: Caller) -> None:
        """Have a prompt judged. Raises ApiError if it is blocked."""
        verdict = await self.moderation.check(text, "prompt", key=caller.name, model=served.name)
        if verdict.blocked:
            raise blocked(self.policy)

    async def updates(self, run: Run) -> AsyncGenerator[list[Update], None]:
        """Yield what the engine adds to a request's samples, and note it in `run`; closing the iterator cancels it.

        Raises:
            ApiError: if the engine refuses or fails, if a grammar does in the middle of an answer, and 504 after
                `most_seconds`.
        """
        assert isinstance(run.served, Served)
        generation = self._submit(run.served.engine, run.request)
        with self.counted(run):
            try:
                async for found in generation.updates(self.most_seconds):
                    self._note(run, generation, found)
                    _check_guides(generation)
                    yield found
            except UserError as error:
                raise too_long(str(error), "max_tokens") from None
            except EngineFailed:
                raise ApiError(
                    "the engine failed; the server's log says why",
                    status=500,
                    kind="server_error",
                    code="engine_failed",
                ) from None
            finally:
                if len(run.reasons) < run.request.samples:
                    self._cancel(generation)
                self._account(run, generation)

    @contextlib.contextmanager
    def counted(self, run: Run) -> Iterator[None]:
        """Count a request while it runs; then its caller is charged. Raises ApiError 504 for a TimeoutError."""
        self.unanswered += 1
        self.open += 1
        try:
            yield
        except TimeoutError:
            raise ApiError(
                f"the answer took longer than {self.most_seconds:.0f} s; ask for fewer tokens",
                status=504,
                kind="timeout_error",
                code="timeout",
            ) from None
        finally:
            self.unanswered -= run.first is None
            self.open -= 1
            run.caller.spend(run.usage.prompt_tokens + run.usage.completion_tokens, run.usage.usd)
            self._told(run)

    def arrived(self, run: Run) -> None:
        """Note that a piece of the answer has come."""
        run.last = time.perf_counter()
        if run.first is None:
            run.first = run.last
            self.unanswered -= 1

    def charge(self, run: Run, share: Share) -> None:
        """Note a request's share of the machine so far."""
        usage = run.usage
        usage.seconds, usage.joules, usage.usd = (
            share.seconds,
            share.joules,
            share.seconds * self._usd_per_second,
        )

    def _note(self, run: Run, generation: Generation, found: Sequence[Update]) -> None:
        fresh = run.first is None
        self.arrived(run)
        if fresh:
            assert generation.job is not None
            run.prompt_logprobs, run.prompt_top = generation.job.prompt_logprobs, generation.job.prompt_top
        run.usage.completion_tokens += sum(len(update.ids) for update in found)
        run.reasons += [update.finish_reason for update in found if update.finish_reason]
        self._account(run, generation)

    def _account(self, run: Run, generation: Generation) -> None:
        self.charge(run, generation.share)
        if generation.job is not None:
            run.usage.cached_tokens = generation.job.cached


def blocked(policy: Policy | None) -> ApiError:
    """What is said of a prompt that moderation blocks."""
    refusal = policy.refusal if policy is not None else None
    return ApiError(refusal or "the prompt was blocked by this server's moderation", code="content_filter")


def _check_guides(generation: Generation) -> None:
    """Raise ApiError if a grammar could not be followed to its end: half of an answer is none."""
    guides = generation.job.constraints if generation.job is not None else ()
    if any(isinstance(guide, Guide) and guide.failed for guide in guides):
        raise ApiError(
            "the grammar grew too complex in the middle of the answer; give a simpler schema, expression or tool",
            param="response_format",
            code="grammar_failed",
        )
