"""/v1/chat/completions: OpenAI's objects around a conversation's deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from farthing.serve.api import head
from farthing.serve.conversation import Conversation, Delta


async def chunks(
    conversation: Conversation, include_usage: bool, each_usage: bool = False
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield `chat.completion.chunk` objects.

    Args:
        include_usage: end with a chunk that holds the usage.
        each_usage: every chunk holds the usage so far.
    """
    start = head("chatcmpl", "chat.completion.chunk", conversation.served.name)

    def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
        made = {**start, "choices": choices}
        if each_usage:
            made["usage"] = conversation.usage.body
        elif include_usage:
            made["usage"] = None
        return made

    for index in range(conversation.choices):
        yield chunk([_choice(index, {"role": "assistant", "content": "", "refusal": None})])
    async with aclosing(conversation.deltas()) as deltas:
        async for delta in deltas:
            yield chunk([_choice(delta.index, _said(delta), delta)])
    if include_usage:
        yield {**start, "choices": [], "usage": conversation.usage.body}


def _choice(index: int, said: dict[str, Any], delta: Delta | None = None) -> dict[str, Any]:
    entries = delta.logprobs if delta is not None else []
    return {
        "index": index,
        "delta": said,
        "logprobs": {"content": entries, "refusal": None} if entries else None,
        "finish_reason": delta.finish_reason if delta is not None else None,
    }


def _said(delta: Delta) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if delta.thinking:
        said["reasoning_content"] = said["reasoning"] = delta.thinking
    if delta.text:
        said["content"] = delta.text
    if delta.calls:
        said["tool_calls"] = delta.calls
    return said


async def completion(conversation: Conversation) -> dict[str, Any]:
    """The whole `chat.completion`."""
    whole = [Delta(index) for index in range(conversation.choices)]
    async with aclosing(conversation.deltas()) as deltas:
        async for delta in deltas:
            mine = whole[delta.index]
            mine.thinking += delta.thinking
            mine.text += delta.text
            mine.calls += delta.calls
            mine.logprobs += delta.logprobs
            mine.finish_reason = delta.finish_reason
    return {
        **head("chatcmpl", "chat.completion", conversation.served.name),
        "choices": [_whole(mine, bool(conversation.body.logprobs)) for mine in whole],
        "usage": conversation.usage.body,
    }


def _whole(delta: Delta, logprobs: bool) -> dict[str, Any]:
    calls = [{key: value for key, value in call.items() if key != "index"} for call in delta.calls]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": delta.text if delta.text or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if delta.thinking:
        message["reasoning_content"] = message["reasoning"] = delta.thinking
    if calls:
        message["tool_calls"] = calls
    return {
        "index": delta.index,
        "message": message,
        "logprobs": {"content": delta.logprobs, "refusal": None} if logprobs else None,
        "finish_reason": delta.finish_reason,
    }
