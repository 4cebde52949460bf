"""/v1/responses, for text: OpenAI's newer form of a conversation, translated to the older one and back.

Nothing is stored: a response cannot be fetched later, and a conversation is sent whole each time.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from farthing.serve.conversation import Conversation, Delta
from farthing.serve.errors import ApiError, from_validation
from farthing.serve.protocol import MOST_TOOLS, Body, ChatRequest, Count, RefusalPart, Text, TextPart


class InputMessage(Body):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart | RefusalPart]


class InputCall(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputResult(Body):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[TextPart]


class InputThought(Body):
    """An earlier thought, which is not read again."""

    type: Literal["reasoning"]


class FlatTool(Body):
    """A function, without the inner table of chat's tools."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFlatTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(Body):
    """How the text must look."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextSettings(Body):
    """Of the text in the answer."""

    format: TextFormat = Field(default_factory=TextFormat.model_construct)


class Reasoning(Body):
    """Of the thinking."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Body):
    """The body of /v1/responses."""

    model: Text | None = None
    input: (
        Text | Annotated[list[InputMessage | InputCall | InputResult | InputThought], Field(max_length=4096)]
    ) = ""
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    thinking_budget: Count | None = None
    stream: bool | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFlatTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: Text | None = None
    conversation: Text | dict[str, Any] | None = None
    background: bool | None = None

    def chat(self, lenient: bool) -> ChatRequest:
        """The same request as for /v1/chat/completions.

        Raises:
            ApiError: for what rests on earlier requests, which are not stored, and for what chat refuses.
        """
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name) and not lenient:
                raise ApiError(
                    f"{name}: nothing is stored here; send the whole conversation as input, and wait for the answer",
                    status=400 if name == "background" else 404,
                    param=name,
                    code="not_stored",
                )
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFlatTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        body = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": bool(self.top_logprobs),
            "top_logprobs": self.top_logprobs or None,
            "tools": tools or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "thinking_budget": self.thinking_budget,
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise from_validation(error.errors()) from None

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputMessage):
                content: Any = item.content
                if not isinstance(content, str):
                    content = [part.model_dump() for part in content]
                messages.append({"role": item.role, "content": content})
            elif isinstance(item, InputCall):
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                if not (messages and messages[-1]["role"] == "assistant"):
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(item, InputResult):
                text = (
                    item.output
                    if isinstance(item.output, str)
                    else "".join(part.text for part in item.output)
                )
                messages.append({"role": "tool", "content": text, "tool_call_id": item.call_id})
        return messages

    def _format(self) -> dict[str, Any] | None:
        if self.text is None:
            return None
        given = self.text.format
        if given.type == "json_schema":
            return {
                "type": "json_schema",
                "json_schema": {"name": given.name or "answer", "schema": given.schema_},
            }
        return {"type": given.type}


class _Item:
    """An item of the output, as it grows."""

    def __init__(self, kind: str, place: int) -> None:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self.kind, self.place, self.id = kind, place, f"{prefix}_{secrets.token_hex(16)}"
        self.text, self.logprobs = "", list[dict[str, Any]]()
        self.call: dict[str, Any] = {}

    @property
    def part(self) -> dict[str, Any]:
        """Its only part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def body(self, status: str, empty: bool = False) -> dict[str, Any]:
        """The item in OpenAI's form."""
        head = {"id": self.id, "type": self.kind, "status": status}
        parts = [] if empty else [self.part]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": parts}
        if self.kind == "message":
            return {**head, "role": "assistant", "content": parts}
        function = self.call["function"]
        arguments = "" if empty else function["arguments"]
        return {**head, "call_id": self.call["id"], "name": function["name"], "arguments": arguments}


class _Response:
    """A response, as it grows."""

    def __init__(self, conversation: Conversation, body: ResponsesRequest) -> None:
        self.conversation, self.request = conversation, body
        self.id, self.created = f"resp_{secrets.token_hex(24)}", time.time()
        self.items: list[_Item] = []
        self.finish_reason: str | None = None

    def body(self, status: str) -> dict[str, Any]:
        """The response in OpenAI's form."""
        request, usage = self.request, self.conversation.usage.body
        sampling = self.conversation.run.request.sampling
        ended = status in ("completed", "incomplete")
        tools = [{"strict": None, **tool.model_dump()} for tool in request.tools or ()]
        choice = request.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.conversation.served.name,
            "output": [item.body("completed") for item in self.items] if ended else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}}
            if request.text is None
            else request.text.model_dump(by_alias=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": tools,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "metadata": request.metadata or {},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
                "cost": usage["cost"],
            }
            if ended
            else None,
        }

    @property
    def status(self) -> str:
        return "incomplete" if self.finish_reason == "length" else "completed"


async def events(conversation: Conversation, body: ResponsesRequest) -> AsyncGenerator[tuple[str, Any], None]:
    """Yield a stream's events: (name, event)."""
    response, number = _Response(conversation, body), itertools.count()

    def event(kind: str, **values: Any) -> tuple[str, Any]:
        return kind, {"type": kind, "sequence_number": next(number), **values}

    yield event("response.created", response=response.body("in_progress"))
    yield event("response.in_progress", response=response.body("in_progress"))
    async with aclosing(conversation.deltas()) as deltas:
        async for delta in deltas:
            for kind, values in _changes(response, delta):
                yield event(kind, **values)
    for kind, values in _ended(response):
        yield event(kind, **values)
    yield event(f"response.{response.status}", response=response.body(response.status))


async def whole(conversation: Conversation, body: ResponsesRequest) -> dict[str, Any]:
    """The whole response."""
    response = _Response(conversation, body)
    async with aclosing(conversation.deltas()) as deltas:
        async for delta in deltas:
            for _ in _changes(response, delta):
                pass
    if not response.items:
        response.items.append(_Item("message", 0))
    return response.body(response.status)


_Changes = list[tuple[str, dict[str, Any]]]


def _changes(response: _Response, delta: Delta) -> _Changes:
    """Add a delta to the response; the events that say so."""
    found: _Changes = []
    response.finish_reason = delta.finish_reason or response.finish_reason
    if delta.thinking:
        item = _current(response, "reasoning", found)
        item.text += delta.thinking
        found.append(("response.reasoning_text.delta", {**_at(item), "delta": delta.thinking}))
    if delta.text:
        item = _current(response, "message", found)
        item.text += delta.text
        item.logprobs += delta.logprobs
        said = {**_at(item), "delta": delta.text, "logprobs": delta.logprobs}
        found.append(("response.output_text.delta", said))
    for call in delta.calls:
        found += _ended(response)
        item = _Item("function_call", len(response.items))
        item.call = call
        response.items.append(item)
        found.append(_added(item))
        arguments = call["function"]["arguments"]
        where = {"item_id": item.id, "output_index": item.place}
        found.append(("response.function_call_arguments.delta", {**where, "delta": arguments}))
        done = {**where, "name": call["function"]["name"], "arguments": arguments}
        found.append(("response.function_call_arguments.done", done))
        found.append(
            ("response.output_item.done", {"output_index": item.place, "item": item.body("completed")})
        )
    return found


def _current(response: _Response, kind: str, found: _Changes) -> _Item:
    """The last item if it is of this kind, else a new one."""
    if response.items and response.items[-1].kind == kind:
        return response.items[-1]
    found += _ended(response)
    item = _Item(kind, len(response.items))
    response.items.append(item)
    found.append(_added(item))
    found.append(("response.content_part.added", {**_at(item), "part": item.part}))
    return item


def _added(item: _Item) -> tuple[str, dict[str, Any]]:
    return "response.output_item.added", {
        "output_index": item.place,
        "item": item.body("in_progress", empty=True),
    }


def _ended(response: _Response) -> _Changes:
    """Events that close the last item."""
    if not response.items or response.items[-1].kind == "function_call":
        return []
    item = response.items[-1]
    kind = "output_text" if item.kind == "message" else "reasoning_text"
    extra = {"logprobs": item.logprobs} if item.kind == "message" else {}
    return [
        (f"response.{kind}.done", {**_at(item), "text": item.text, **extra}),
        ("response.content_part.done", {**_at(item), "part": item.part}),
        ("response.output_item.done", {"output_index": item.place, "item": item.body("completed")}),
    ]


def _at(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.place, "content_index": 0}
