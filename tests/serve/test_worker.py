"""The worker's thread outlives what goes wrong in it."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from farthing.base.errors import UserError
from farthing.engine.sampling import Sampling
from farthing.engine.sequence import Request
from farthing.serve.worker import EngineFailed, Worker


class Refusing:
    """An engine that takes no request."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(step=lambda: None)

    def add(self, request: Request) -> None:
        raise UserError("too long") if len(request.ids) > 1 else RuntimeError("a fault")


@pytest.mark.parametrize(("ids", "error"), [((1,), EngineFailed), ((1, 2), UserError)])
def test_a_request_that_cannot_be_queued_ends_alone(ids: tuple[int, ...], error: type[Exception]) -> None:
    engine = Refusing()
    worker = Worker([cast(Any, engine)])

    async def ask() -> None:
        generation = worker.submit(cast(Any, engine), Request(ids, Sampling(max_new_tokens=1)))
        async for _ in generation.updates(seconds=20):
            pass

    worker.start()
    for _ in range(2):
        with pytest.raises(error):
            asyncio.run(ask())
    assert worker.alive
    worker.stop()
