"""The server without HTTP: models by name, who may ask, what runs, what it costs. Routes and page share it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from farthing.serve.answers import Answers
from farthing.serve.api import chat
from farthing.serve.api.completions import Completions
from farthing.serve.backends.remote import RelayedCompletions, RelayedConversation, Remote
from farthing.serve.bill import Bill
from farthing.serve.conversation import Conversation
from farthing.serve.errors import ApiError, from_validation, loading, unknown_model
from farthing.serve.keys import Caller, Keys
from farthing.serve.metrics import Metrics
from farthing.serve.protocol import ChatRequest, CompletionRequest
from farthing.serve.safety import Moderation, Policy
from farthing.serve.served import Served, Spoken
from farthing.serve.worker import Worker


@dataclass(frozen=True)
class Bounds:
    """What one request may ask of the server."""

    body_bytes: int = 1_000_000
    body_seconds: float = 30.0  # to send a body
    answer_seconds: float = 600.0
    waiting: int = 256  # requests without a first token


_BOUNDS = Bounds()
_Asked = TypeVar("_Asked", Conversation, Completions)


class Gateway:
    """Serves models from `start` to `stop`.

    Args:
        names: of the models; the first is the default.
        lenient: an unknown model's name means the first model, and what only OpenAI's servers could do is ignored; for
            clients with names of their own, and for their tests.
        moderation, policy: what may come in and go out, and what stands before every conversation.
    """

    def __init__(
        self,
        names: Sequence[str],
        keys: Keys,
        bill: Bill,
        bounds: Bounds = _BOUNDS,
        lenient: bool = False,
        moderation: Moderation | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.models = list(names)
        self.served: dict[str, Spoken] = {}
        self.keys, self.bill, self.bounds, self.lenient = keys, bill, bounds, lenient
        self.moderation, self.policy = moderation or Moderation(), policy
        self._worker: Worker | None = None
        self._booking: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        if self._worker is None or not self._worker.alive:
            return False
        return all(served.process.ready for served in self._remotes)

    @property
    def busy(self) -> bool:
        """Whether answers are being written."""
        return self._worker is not None and self.answers.open > 0

    @property
    def _remotes(self) -> list[Remote]:
        return [served for served in self.served.values() if isinstance(served, Remote)]

    def start(self, models: Sequence[Spoken]) -> None:
        """Begin to answer, with these models by the names given before. Call it in the event loop."""
        self.served = {served.name: served for served in models}
        self._worker = Worker(
            [served.engine for served in models if isinstance(served, Served)], self.bill.joules
        )
        self.metrics = Metrics(models)
        self.answers = Answers(
            self._worker.submit,
            self._worker.cancel,
            most_waiting=self.bounds.waiting,
            most_seconds=self.bounds.answer_seconds,
            usd_per_second=self.bill.usd_per_second,
            told=self.metrics.ended,
            moderation=self.moderation,
            policy=self.policy,
            lenient=self.lenient,
        )
        self._worker.start()
        self._booking = asyncio.create_task(self._book(self._worker))

    async def stop(self) -> None:
        """Stop the engines, and close the books."""
        if self._worker is None or self._booking is None:
            return
        self._booking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._booking
        await self.moderation.close()
        await asyncio.to_thread(self._worker.stop)
        self._write_books(self._worker)
        await asyncio.gather(*(served.process.stop() for served in self._remotes))

    def model(self, name: str | None) -> Spoken:
        """The model of a request. Raises ApiError 404 for one that is not served."""
        if name is None or (self.lenient and name not in self.served):
            return next(iter(self.served.values()))
        if name not in self.served:
            raise unknown_model(name, self.models)
        return self.served[name]

    def caller(self, key: str | None) -> Caller:
        """The holder of a key. Raises ApiError 401 for a wrong one."""
        caller = self.keys.caller(key)
        if caller is None:
            raise ApiError(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
        return caller

    async def conversation(self, body: ChatRequest, caller: Caller) -> Conversation:
        """A conversation that is ready to be answered. Raises ApiError for what cannot be answered."""
        return await self._prepared(Conversation, RelayedConversation, body, caller)

    async def completions(self, body: CompletionRequest, caller: Caller) -> Completions:
        """Texts that are ready to be continued. Raises ApiError for what cannot be continued."""
        return await self._prepared(Completions, RelayedCompletions, body, caller)

    async def _prepared(self, ours: type[_Asked], relayed: type[_Asked], body: Any, caller: Caller) -> _Asked:
        served = self.model(body.model)
        made = (relayed if isinstance(served, Remote) else ours)(self.answers, served, body, caller)
        with self.answers.preparing():
            await made.prepare()
        return made

    async def chat(self, body: dict[str, Any], key: str | None) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of /v1/chat/completions, the last with the usage; closing the iterator cancels the answer.

        Raises:
            ApiError: for a wrong key or body, and for what cannot be answered.
        """
        caller = self.caller(key)
        if not self.ready:
            raise loading()
        try:
            request = ChatRequest.model_validate(body)
        except ValidationError as error:
            raise from_validation(error.errors()) from None
        async with aclosing(
            chat.chunks(
                await self.conversation(request, caller),
                include_usage=True,
                each_usage=request.says_each_usage,
            )
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _book(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.bill.due() and self._remotes:
                self._write_books(worker)
            elif self.bill.due():
                worker.order(lambda: self._write_books(worker))

    def _write_books(self, worker: Worker) -> None:
        clocks = {served.clock for served in self._remotes}
        busy = worker.take_busy_seconds() + sum(clock.take_busy_seconds() for clock in clocks)
        self.bill.book(list(self.served.values()), busy)
