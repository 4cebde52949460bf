"""The queue's bound, and answers that may not go on."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from farthing.serve.answers import Answers
from farthing.serve.api.completions import Completions
from farthing.serve.conversation import Outgoing
from farthing.serve.errors import ApiError
from farthing.serve.keys import Caller
from farthing.serve.safety import Direction, Moderation

SOMEONE = Caller("someone")


def answers(**options: Any) -> Answers:
    return Answers(cast(Any, None), cast(Any, None), **options)


def test_requests_that_get_ready_count_as_waiting() -> None:
    queue = answers(most_waiting=2)
    with queue.preparing():
        queue.admit(SOMEONE, 2)
        with pytest.raises(ApiError, match="0 requests wait"):
            queue.admit(SOMEONE, 3)
        with queue.preparing():
            queue.admit(SOMEONE)
            with pytest.raises(ApiError, match="1 requests wait") as refused:
                queue.admit(SOMEONE, 2)
            assert refused.value.status == 503
    with queue.preparing():
        queue.admit(SOMEONE, 2)


class Endless(Completions):
    """Two choices of a prompt that never end of themselves."""

    def __init__(self, moderation: Moderation) -> None:
        self.answers, self.each, self.closed = answers(moderation=moderation), 2, False
        self.runs = [cast(Any, None)]
        served = cast(Any, type("Served", (), {"name": "m"}))
        self._outgoing = [Outgoing(self.answers, served, SOMEONE) for _ in range(2)]

    async def _continued(self, number: int) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for turn in range(1000):
                word = "bad. " if turn > 5 else "good. "
                yield {"index": turn % 2, "text": word, "logprobs": None, "finish_reason": None}
        finally:
            self.closed = True


def test_a_prompt_whose_choices_are_all_blocked_ends() -> None:
    async def hook(text: str, direction: Direction) -> tuple[str, ...]:
        return ("evil",) if "bad" in text else ()

    async def run() -> tuple[list[dict[str, Any]], bool]:
        endless = Endless(Moderation("block", hook))
        return [change async for change in endless.changes()], endless.closed

    changes, closed = asyncio.run(run())
    assert closed
    assert [change["finish_reason"] for change in changes] == [
        *[None] * 6,
        "content_filter",
        "content_filter",
    ]
    assert "".join(change["text"] for change in changes) == "good. " * 6
