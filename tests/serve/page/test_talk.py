"""Both columns are answered at once, and nothing runs on when nobody reads it."""

import asyncio
import re
from contextlib import aclosing
from typing import Any

import pytest

from farthing.serve.page import answers
from farthing.serve.page.answers import Message, question
from farthing.serve.page.talk import Column, Settings, replies

DEFAULTS = Settings()


def reply(gateway: Any, *columns: Column, settings: Settings = DEFAULTS) -> list[list[Message]]:
    """What all columns show in the end."""

    async def last() -> list[list[Message]]:
        return [
            shown async for shown in replies(gateway, list(columns), settings, "secret", asyncio.Event())
        ][-1]

    return asyncio.run(last())


def test_both_columns_answer_one_prompt(gateway: Any) -> None:
    both = reply(gateway, Column("trained", [question("hello")]), Column("base", [question("hello")]))
    assert [answers.text(shown[1]) for shown in both] == [
        "I am trained, and you said: hello",
        "I am base, and you said: hello",
    ]
    assert gateway.asked_by == ["secret", "secret"]


def test_settings_reach_the_gateway(gateway: Any) -> None:
    reply(gateway, Column("trained", [question("hello")]), settings=Settings("Be brief.", 0.2, 64))
    assert gateway.asked == [
        {
            "model": "trained",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
            "temperature": 0.2,
            "max_completion_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]


def test_no_length_means_the_room_there_is(gateway: Any) -> None:
    reply(gateway, Column("trained", [question("hello")]))
    assert gateway.asked[0]["max_completion_tokens"] is None


def test_a_column_that_ends_with_an_answer_is_left_alone(gateway: Any) -> None:
    answered = [question("a"), {"role": "assistant", "content": "b"}]
    left, right = reply(gateway, Column("trained", answered), Column("base", [question("a")]))
    assert left == answered
    assert len(right) == 3
    assert [body["model"] for body in gateway.asked] == ["base"]


@pytest.mark.parametrize(("said", "shown"), [("too long", "2,048 tokens"), ("broken", "The server failed")])
def test_an_error_is_a_message_and_leaves_the_other_column_alone(gateway: Any, said: str, shown: str) -> None:
    left, right = reply(gateway, Column("trained", [question(said)]), Column("base", [question("hello")]))
    assert [answers.kind(message) for message in left] == ["question", "error"]
    assert shown in left[1]["metadata"]["title"]
    assert [answers.kind(message) for message in right] == ["question", "answer", "figures"]


def leave(gateway: Any, how: str) -> list[list[Message]]:
    """Read two long answers until both have begun, then leave; returns what was shown last."""
    columns = [Column("trained", [question("long")]), Column("base", [question("long")])]
    last: list[list[Message]] = []

    async def read() -> None:
        nonlocal last
        stop = asyncio.Event()
        async with aclosing(replies(gateway, columns, Settings(), None, stop)) as updates:
            async for last in updates:
                if gateway.running == 2 and all(answers.text(shown[1]) for shown in last):
                    if how == "closing":
                        return
                    if how == "stopping":
                        stop.set()
                    else:
                        asyncio.current_task().cancel()  # type: ignore[union-attr]

    async def run() -> None:
        task = asyncio.create_task(read())
        await asyncio.wait([task], timeout=20)
        assert task.done()
        assert gateway.running == 0

    asyncio.run(run())
    return last


@pytest.mark.parametrize("how", ["closing", "cancelling"])
def test_what_nobody_reads_is_cancelled(gateway: Any, how: str) -> None:
    leave(gateway, how)


def test_what_is_stopped_is_cancelled_and_says_so(gateway: Any) -> None:
    for shown in leave(gateway, "stopping"):
        assert answers.kind(shown[-1]) == "figures"
        assert re.fullmatch(r"\d+ tokens? · .*stopped", shown[-1]["metadata"]["title"])
        assert "word1999" not in answers.text(shown[1])
