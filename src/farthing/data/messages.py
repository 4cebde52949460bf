"""One form for the messages of a conversation, from the many that data have.

A message is {"role", "content"} with `role` one of system, developer, user, assistant and tool, and `content` a text.
An assistant's may have `reasoning_content`, a text, and `tool_calls`, as OpenAI's API writes them but with arguments as
an object.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from farthing.base.schema import given
from farthing.data.text import is_unicode

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPELLINGS = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "ipython": "tool", "function_call": "assistant",
}  # fmt: skip
_ROLE, _CONTENT = ("role", "from"), ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
_WEIGHT = ("weight", "train", "training")
_PASSED_ON = ("name", "tool_call_id")
_KNOWN = {*_ROLE, *_CONTENT, *REASONING, *_WEIGHT, *_PASSED_ON, "tool_calls", "function_call", "id"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", flags=re.S)


class Unusable(Exception):
    """A row that cannot be learnt from; the text says why, without its place."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them are learnt.

    plain: the same as a text to continue and its continuation, for models without a chat template. variables: further
    ones for the template.
    """

    messages: list[Message]
    learnt: list[bool]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    plain: Passage | None = None

    @property
    def asked(self) -> list[str]:
        """What the user says."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    @property
    def texts(self) -> list[str]:
        """Every text of it: contents and reasoning."""
        return [
            message[key]
            for message in self.messages
            for key in ("content", "reasoning_content")
            if message.get(key)
        ]


@dataclass(frozen=True)
class Passage:
    """Text without a chat template: pieces, and which of them are learnt."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def asked(self) -> list[str]:
        """What comes before the first piece that is learnt; all of it if there is nothing."""
        first = next((number for number, (_, learnt) in enumerate(self.pieces) if learnt), 0)
        return ["".join(text for text, _ in self.pieces[:first]) or self.text]

    @property
    def texts(self) -> list[str]:
        """Its one text."""
        return [self.text]

    @property
    def text(self) -> str:
        """All pieces, joined."""
        return "".join(text for text, _ in self.pieces)


def read_messages(value: Any, notes: Counter[str]) -> tuple[list[Message], list[bool]]:
    """The messages of a list in any spelling, and whether each is learnt: an assistant's is, unless it says otherwise.

    Args:
        notes: counts what is there and not used.

    Raises:
        Unusable: for what is no list of messages, and for a message that cannot be represented.
    """
    value = from_json(value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("the messages are not a list of {role, content}")
    made = [_message(message, number, notes) for number, message in enumerate(value, 1)]
    return [message for message, _ in made], [learnt for _, learnt in made]


def checked(conversation: Conversation) -> Conversation:
    """The conversation. Raises Unusable if nobody could have held it, or if there is nothing to learn from it."""
    roles = [message["role"] for message in conversation.messages]
    while roles and roles[0] in ("system", "developer"):
        roles.pop(0)
    if not roles or roles[-1] != "assistant":
        raise Unusable("the conversation does not end with the assistant's answer")
    allowed = {
        "": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    before = ""
    for role in roles:
        if role not in allowed[before]:
            raise Unusable("user and assistant do not take turns")
        before = role
    for number, message in enumerate(conversation.messages, 1):
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise Unusable("an answer is empty")
        for text in _all_texts(message):
            if not is_unicode(text):
                raise Unusable(f"the content of message {number} holds half a character (a lone surrogate)")
    if not any(conversation.learnt):
        raise Unusable("no answer is to be learnt (weight or train says so)")
    return conversation


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, each {"type": "function", "function": {…}}; None if there are none.

    Raises:
        Unusable: for what describes no tools.
    """
    value = from_json(value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("the tools are not a list of objects, nor JSON of one")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for tool in tools:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("a tool has no name")
    return tools


def with_system(messages: list[Message], learnt: list[bool], system: Any) -> tuple[list[Message], list[bool]]:
    """Put a system message of a column of its own in front. Raises Unusable if it is no text, or if there are two."""
    if system in (None, ""):
        return messages, learnt
    if not isinstance(system, str):
        raise Unusable("the system message is not text")
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == system:
            return messages, learnt
        raise Unusable("there are two system messages, in the messages and in a column")
    return [{"role": "system", "content": system}, *messages], [False, *learnt]


def from_json(value: Any) -> Any:
    """A value that may have been written as JSON text into a column."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def leaves(value: Any) -> Iterator[str]:
    """The texts and numbers in an object of JSON, as text."""
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


# ---------------------------------------------------------------- one message


def _message(given_: Message, number: int, notes: Counter[str]) -> tuple[Message, bool]:
    found = {key: value for key, value in given_.items() if value is not None}
    said = next((found[key] for key in _ROLE if key in found), None)
    role = _SPELLINGS.get(said, said) if isinstance(said, str) else None
    if role not in ROLES:
        raise Unusable(f"message {number} is by {given(said)}; there are {', '.join(ROLES)}")
    if "train_detail" in found:
        raise Unusable(f"message {number} has a train_detail; only whole messages are learnt or not")
    for key in found.keys() - _KNOWN:
        notes[f"the key {key!r} of messages is not used"] += 1
    reasoning, content = _content(next((found[key] for key in _CONTENT if key in found), None), found, number)
    calls = _calls(found, number)
    if said == "function_call":
        calls, content = _call_in_text(content, number), ""
    message: Message = {"role": role, "content": content}
    message |= {key: found[key] for key in _PASSED_ON if isinstance(found.get(key), str)}
    if role != "assistant":
        if calls or reasoning:
            raise Unusable(f"message {number} has {'tool calls' if calls else 'reasoning'}, but is by {role}")
        if _weight(found, number) and any(key in found for key in ("train", "training")):
            raise Unusable(f"message {number} is to be learnt, but is by {role}; only the assistant's are")
        return message, False
    if reasoning is None and (inside := _THOUGHT.match(content)):
        # the text as it was is kept: a template may write it so
        message |= {
            "inline": content,
            "reasoning_content": inside[1].strip("\n"),
            "content": content[inside.end() :],
        }
    elif reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message, _weight(found, number)


def _content(value: Any, found: Message, number: int) -> tuple[str | None, str]:
    """(reasoning, text) of a message."""
    reasoning = next((found[key] for key in REASONING if found.get(key)), None)
    if isinstance(value, list):
        thoughts: list[str] = []
        texts: list[str] = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = part.get(kind, part.get("text")) if isinstance(part, dict) else part
            if kind not in (*_TEXT_PARTS, "thinking", "reasoning"):
                raise Unusable(f"message {number} holds {given(kind)} beside text, which is not read")
            if not isinstance(text, str):
                raise Unusable(f"the content of message {number} is not text")
            (texts if kind in _TEXT_PARTS else thoughts).append(text)
        value = "".join(texts)
        reasoning = reasoning or "\n".join(thoughts) or None
    if value is None and (found.get("tool_calls") or found.get("function_call")):
        value = ""
    if not isinstance(value, str) or not isinstance(reasoning, str | None):
        what = "content" if not isinstance(value, str) else "reasoning"
        raise Unusable(f"the {what} of message {number} is not text")
    return reasoning, value


def _weight(found: Message, number: int) -> bool:
    values = [found[key] for key in _WEIGHT if key in found]
    for value in values:
        if value not in (0, 1):  # false and true are among them
            raise Unusable(
                f"message {number} has the weight {given(value)}; a message is learnt (1) or not (0)"
            )
    return all(values)


def _calls(found: Message, number: int) -> list[Message]:
    calls = from_json(found.get("tool_calls")) or []
    if isinstance(found.get("function_call"), dict):
        calls = [found["function_call"]]
    if not isinstance(calls, list):
        raise Unusable(f"the tool calls of message {number} are not a list")
    return [_call(call, number) for call in calls]


def _call_in_text(text: str, number: int) -> list[Message]:
    calls = from_json(text)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, number) for call in calls]


def _call(call: Any, number: int) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise Unusable(f"a tool call of message {number} has no function with a name")
    arguments = from_json(function.get("arguments", function.get("parameters")) or {})
    if not isinstance(arguments, dict):
        raise Unusable(f"the arguments of a tool call of message {number} are no object, nor JSON of one")
    made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _all_texts(message: Message) -> Iterator[str]:
    yield message["content"]
    yield message.get("reasoning_content", "")
    yield from leaves(message.get("tool_calls"))
