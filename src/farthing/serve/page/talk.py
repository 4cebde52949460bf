"""What the page's buttons do to its two conversations; knows nothing of how they are drawn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from farthing.serve.errors import ApiError
from farthing.serve.page import answers
from farthing.serve.page.answers import Answer, Message

# Between two updates of the page, each of which the browser draws: the longer the conversation, the longer that takes.
_SECONDS, _SECONDS_A_MESSAGE = 0.05, 0.001


class Gateway(Protocol):
    """What the page asks: see `serve.gateway.Gateway`."""

    @property
    def models(self) -> list[str]: ...

    def chat(self, body: dict[str, Any], key: str | None) -> AsyncGenerator[dict[str, Any], None]: ...


@dataclass
class Column:
    """One model and what has been said with it."""

    model: str
    shown: list[Message]


@dataclass(frozen=True)
class Settings:
    system: str = ""
    temperature: float = 0.7
    length: int = 0  # of an answer in tokens; 0 is what the context has room for


async def replies(
    gateway: Gateway, columns: list[Column], settings: Settings, key: str | None, stop: asyncio.Event
) -> AsyncGenerator[list[list[Message]], None]:
    """Answer the columns that end with a question, all at once; yields what all columns show, as it grows.

    When `stop` is set, and when the caller closes this or is cancelled, every answer is cancelled at the gateway.
    """
    answering = {
        index: Answer(column.model)
        for index, column in enumerate(columns)
        if answers.unanswered(column.shown)
    }
    changed = asyncio.Event()
    pause = _SECONDS + _SECONDS_A_MESSAGE * sum(len(column.shown) for column in columns)

    def now() -> list[list[Message]]:
        said = [answering[index].messages() if index in answering else [] for index in range(len(columns))]
        return [column.shown + messages for column, messages in zip(columns, said, strict=True)]

    tasks = [
        asyncio.create_task(_answer(gateway, columns[index].shown, answer, settings, key, changed))
        for index, answer in answering.items()
    ]
    stopping = asyncio.create_task(stop.wait())
    stopping.add_done_callback(lambda _: changed.set())
    try:
        yield now()
        while not stop.is_set() and not all(task.done() for task in tasks):
            await changed.wait()
            changed.clear()
            yield now()
            await asyncio.sleep(pause)
        await _cancel(tasks)
        yield now()
    finally:
        await _cancel([*tasks, stopping])


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    gateway: Gateway,
    shown: list[Message],
    answer: Answer,
    settings: Settings,
    key: str | None,
    changed: asyncio.Event,
) -> None:
    body = {
        "model": answer.model,
        "messages": answers.asked(shown, settings.system),
        "temperature": settings.temperature,
        "max_completion_tokens": settings.length or None,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},  # for what is stopped
    }
    error = ""
    try:
        async with aclosing(gateway.chat(body, key)) as chunks:
            async for chunk in chunks:
                answer.take(chunk)
                changed.set()
    except asyncio.CancelledError:
        answer.stopped = True
        raise
    except ApiError as problem:
        error = problem.message
    except Exception:
        logging.getLogger(__name__).exception("an answer for the page failed")
        error = "The server failed at this answer; its log says where. Try again."
    finally:
        answer.end(error)
        changed.set()
