"""Conversations to tokens with loss masks, by the chat template of the model.

An answer is learnt as it will be asked for: in the rendering in which it comes last, from the end of the opened turn
to the token on which generation stops. Where a later rendering begins the same way, one text teaches several answers;
where a template rewrites earlier turns, as those do that take earlier reasoning out, an answer has a text of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farthing.base.errors import UserError
from farthing.data.messages import Conversation, Message, Passage, Unusable, leaves
from farthing.data.template import Unrenderable
from farthing.data.tokenizer import Tokenizer

_FORCED = re.compile(r"<think>\s*$")
_CLOSED = re.compile(r"\s*(?:<think>\s*)?</think>\s*")
_SENTINEL = "farthing sentinel"
_COMPARED = 4  # characters
_THINKING = {"thinking": True, "enable_thinking": True}  # DeepSeek-V3.1's and Qwen3's names for it


@dataclass(frozen=True)
class Example:
    """A text as tokens: ids int32 [N]; loss bool [N], true for tokens that are learnt."""

    ids: np.ndarray
    loss: np.ndarray


@dataclass
class Rendered:
    """A text, and the ranges of it that are learnt; marks: whether the tokenizer puts its own (BOS, EOS) around it."""

    text: str
    learnt: list[tuple[int, int]] = field(default_factory=list)
    marks: bool = False


def encode(tokenizer: Tokenizer, learnable: Conversation | Passage) -> list[Example]:
    """What is learnt of a conversation, as tokens: one text, or several where the template rewrites earlier turns.

    Raises:
        Unusable: when a message holds a control token, or the template cannot show what is to be learnt; the text names
            the message.
        Unrenderable: for a template that goes beyond its limits.
    """
    return [tokens(tokenizer, rendered) for rendered in render(tokenizer, learnable)]


def render(tokenizer: Tokenizer, learnable: Conversation | Passage) -> list[Rendered]:
    """`encode`, as texts."""
    if isinstance(learnable, Conversation) and not tokenizer.has_template:
        if learnable.plain is None:
            raise Unusable(
                "the model has no chat template, as base models have none; give one with chat_template (chatml, plain, "
                "or a file)"
            )
        learnable = learnable.plain
    if isinstance(learnable, Passage):
        return [_plain(learnable)]
    _refuse_control_tokens(tokenizer, learnable)
    refused: list[Unusable] = []  # what a template says of the first spelling that it renders tells most
    for spelling in _spellings(learnable):
        try:
            return _texts(_Renderer(tokenizer, learnable, spelling))
        except Unrenderable:  # it would be so in every spelling, seconds each
            raise
        except Unusable as error:
            refused.append(error)
        except UserError as error:
            broken = Unusable(str(error))
    raise refused[0] if refused else broken


def tokens(tokenizer: Tokenizer, rendered: Rendered) -> Example:
    """A rendered text as tokens. A token is learnt if its last character is."""
    ids, offsets = tokenizer.offset_encode(rendered.text, rendered.marks)
    learnt = np.zeros(len(rendered.text) + 1, dtype=bool)
    for start, end in rendered.learnt:
        learnt[start:end] = True
    loss = [bool(learnt[end - 1]) for _, end in offsets]  # marks end at 0, before the text
    if rendered.marks:
        if tokenizer.eos_id is None:
            raise UserError(f"the tokenizer of {tokenizer.folder} has no eos_token to end a text with")
        if ids[-1:] != [tokenizer.eos_id]:
            ids, loss = [*ids, tokenizer.eos_id], [*loss, bool(loss and loss[-1])]
    return Example(np.array(ids, dtype=np.int32), np.array(loss, dtype=bool))


def pieces(tokenizer: Tokenizer, rendered: Rendered) -> list[tuple[str, bool]]:
    """The text in pieces, by whether their tokens are learnt; with the end token that a plain text gets."""
    example = tokens(tokenizer, rendered)
    _, offsets = tokenizer.offset_encode(rendered.text, rendered.marks)
    found: list[tuple[str, bool]] = []
    at = 0
    for number, on in enumerate(example.loss.tolist()):
        if number < len(offsets):
            end = max(at, offsets[number][1])
            text, at = rendered.text[at:end], end
        else:
            text = tokenizer.token_text(int(example.ids[number]))
        if found and found[-1][1] == on:
            found[-1] = (found[-1][0] + text, on)
        else:
            found.append((text, on))
    return [piece for piece in found if piece[0]]


def _plain(passage: Passage) -> Rendered:
    ranges, at = [], 0
    for text, learnt in passage.pieces:
        if learnt:
            ranges.append((at, at + len(text)))
        at += len(text)
    return Rendered(passage.text, ranges, marks=True)


def _refuse_control_tokens(tokenizer: Tokenizer, conversation: Conversation) -> None:
    named: list[tuple[str, Any]] = [
        (f"message {number}", {key: value for key, value in message.items() if key != "inline"})
        for number, message in enumerate(conversation.messages, 1)
    ]
    for name, part in [*named, ("the list of tools", conversation.tools)]:
        for text in leaves(part):
            found = tokenizer.special_ids.intersection(tokenizer.raw_encode(text))
            if found:
                raise Unusable(
                    f"{name} holds a control token of the tokenizer (id {min(found)}), which would end or fake a turn; "
                    "take it out"
                )


# ---------------------------------------------------------------- how templates want things spelt


@dataclass(frozen=True)
class _Spelling:
    """One of the ways in which templates read what is not plain content."""

    reasoning: str = "reasoning_content"
    """The key that has it; `inline` has it in the content, between <think> and </think>."""
    arguments_as_text: bool = False
    no_content: str | None = None
    """The content of a message that only calls tools."""
    variables: tuple[tuple[str, bool], ...] = ()


def _spellings(conversation: Conversation) -> Iterator[_Spelling]:
    """From the most to the least likely."""
    thinks = any("reasoning_content" in message for message in conversation.messages)
    inline = any("inline" in message for message in conversation.messages)
    calls = any("tool_calls" in message for message in conversation.messages)
    reasoning = ("inline", "reasoning_content") if inline else ("reasoning_content", "inline", "thinking")
    variables: tuple[tuple[tuple[str, bool], ...], ...] = ((), tuple(_THINKING.items()))
    for given in variables if thinks else variables[:1]:
        for key in reasoning if thinks else reasoning[:1]:
            for as_text in (False, True) if calls else (False,):
                for content in (None, "") if calls else (None,):
                    yield _Spelling(key, as_text, content, given)


def _spelt(message: Message, spelling: _Spelling) -> Message:
    made = {key: value for key, value in message.items() if key not in ("inline", "reasoning_content")}
    if reasoning := message.get("reasoning_content"):
        if spelling.reasoning == "inline":
            made["content"] = (
                message.get("inline") or f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
            )
        else:
            made[spelling.reasoning] = reasoning
    if "tool_calls" in message:
        if spelling.arguments_as_text:
            made["tool_calls"] = [
                call
                | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        if not made["content"]:
            made["content"] = spelling.no_content
    return made


# ---------------------------------------------------------------- one conversation in one spelling


class _Renderer:
    """Renders the beginnings of one conversation."""

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation, spelling: _Spelling) -> None:
        self.tokenizer, self.spelling = tokenizer, spelling
        self.stops = [text for text in tokenizer.stop_texts if text]
        self.messages, self.tools = conversation.messages, conversation.tools
        self.wanted = [number for number, on in enumerate(conversation.learnt) if on]
        template = "".join(tokenizer.templates.values())
        spelt = [_spelt(message, spelling) for message in self.messages]
        if "developer" not in template:  # OpenAI's later name for system
            spelt = [m | {"role": "system"} if m["role"] == "developer" else m for m in spelt]
        self._spelt = spelt
        self._variables = {**dict(spelling.variables), **conversation.variables}
        if self.tools:
            self._variables["tools"] = self.tools

    def opened(self, count: int) -> str:
        """The first `count` messages, the assistant's turn opened."""
        return self.tokenizer.render(self._spelt[:count], True, **self._variables)

    def closed(self, count: int) -> tuple[str, list[tuple[int, int]] | None]:
        """The first `count` messages, and what the template marks as generated."""
        return self.tokenizer.render_marked(self._spelt[:count], False, **self._variables)

    def shows_tools(self) -> bool:
        """Whether the tools make a difference, and all of them stand there by name."""
        text, _ = self.closed(len(self._spelt))
        without = self.tokenizer.render(self._spelt, False, **self._variables | {"tools": None})
        return text != without and all(tool["function"]["name"] in text for tool in self.tools or ())

    def next_mark(self, count: int, closed: str) -> str | None:
        """What stands between the last of the first `count` messages and the next one, if it is a stop token."""
        after = self._spelt[count]["role"] if count < len(self._spelt) else None
        role = after or ("tool" if "tool_calls" in self._spelt[count - 1] else "user")
        followed = [*self._spelt[:count], {"role": role, "content": _SENTINEL}]
        text = self.tokenizer.render(followed, False, **self._variables).partition(_SENTINEL)[0]
        at, mark = max(((text.rfind(stop), stop) for stop in self.stops), default=(-1, ""))
        before = text[:at].rstrip()
        # the answer may lose its reasoning once it is not the last, so only its end can be compared
        if at < 0 or not before.endswith(closed.rstrip()[-_COMPARED:]):
            return None
        return text[len(before) : at] + mark


def _texts(renderer: _Renderer) -> list[Rendered]:
    """As few texts as teach every answer that is wanted, the last of them first in making, in order at the end."""
    if renderer.tools and not renderer.shows_tools():
        raise Unusable("the chat template does not show the tools")
    made: list[Rendered] = []
    for index in reversed(renderer.wanted):
        answer = _answer(renderer, index)
        end = max(end for _, end in answer.learnt)
        same = next((text for text in made if text.text.startswith(answer.text[:end])), None)
        if same is None:
            made.append(answer)
        else:
            same.learnt += answer.learnt
    for text in made:
        text.learnt.sort()
    return made[::-1]


def _answer(renderer: _Renderer, index: int) -> Rendered:
    """The conversation up to an answer and its end, with that answer to learn."""
    message, number = renderer.messages[index], index + 1
    opened, (own, marked) = renderer.opened(index), renderer.closed(number)
    text, reasoning = own, message.get("reasoning_content", "")
    forced = _FORCED.search(opened)
    if forced and not (own.startswith(opened) and _shows(own[len(opened) :], reasoning)):
        text, marked = _rewritten(opened, own, reasoning, forced.start(), number), None
    if not text.startswith(opened):
        raise Unusable(
            f"the chat template does not write the answer of message {number} after the turn that it opens, so the "
            "model would be asked what it never saw; give another chat_template"
        )
    start = len(opened)
    _all_is_shown(renderer, index, text, start)
    if reasoning and opened.rstrip().endswith("</think>"):
        raise Unusable(f"the chat template closes the thought before the reasoning of message {number}")
    end = _end(renderer.stops, text, start)
    if end is not None and _beyond(renderer.stops, text[end:]):
        raise Unusable(f"the chat template goes on after the end of message {number}")
    if end is None:  # the mark of the next turn ends this one
        tail = renderer.next_mark(number, own)
        if tail is None:
            raise Unusable(
                f"no token that stops generation follows the answer of message {number} in the chat template, so the "
                "model would never learn to stop; give another chat_template, or name the token in "
                "generation_config.json"
            )
        text = text.rstrip() + tail  # which begins with the white space that ends the answer
        end = len(text)
    learnt = [(start, end)]
    if marked is not None:
        stop = next(at for at in range(end - 1, -1, -1) if text[at:end] in renderer.stops)
        learnt = [(max(start, a), min(end, b)) for a, b in marked if b > start and a < end]
        if not learnt:
            raise Unusable(f"the chat template's generation marks leave out the answer of message {number}")
        if not text[max(b for _, b in learnt) : stop].strip():
            learnt.append((stop, end))
    return Rendered(text[:end], learnt)


def _rewritten(opened: str, own: str, reasoning: str, at: int, number: int) -> str:
    """The opened turn, whose thought the template has begun, with reasoning and answer as the model writes them.

    Args:
        own: the template's own rendering, without the reasoning.
        at: where the thought begins.
    """
    if not own.startswith(opened[:at]):
        raise Unusable(
            f"the chat template rewrites the turns before message {number}, so its answer cannot be told apart; give "
            "another chat_template"
        )
    rest = own[at:]
    if closed := _CLOSED.match(rest):
        rest = rest[closed.end() :]
    rest = rest.lstrip("\n")
    if reasoning and _shows(rest, reasoning):
        raise Unusable(
            f"the chat template writes the reasoning of message {number} outside the thought it opens"
        )
    if opened.endswith("\n"):  # as DeepSeek-R1 writes; V3.1 puts no lines around its thoughts
        return opened + reasoning.strip("\n") + "\n</think>\n\n" + rest
    return opened + reasoning + "</think>" + rest


def _end(stops: Sequence[str], text: str, start: int) -> int | None:
    """The end of the first stop token from `start` on; None if there is none."""
    found = [(at, at + len(stop)) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found)[1] if found else None


def _beyond(stops: Sequence[str], text: str) -> str:
    """What stands behind an answer but for tokens on which generation stops: Phi-3 ends a conversation with another."""
    for stop in stops:
        text = text.replace(stop, "")
    return text.strip()


def _all_is_shown(renderer: _Renderer, index: int, text: str, start: int) -> None:
    """Raise Unusable if the template leaves out a message, a tool, or a part of the answer."""
    for number, message in enumerate(renderer.messages[: index + 1], 1):
        where = text[start:] if number == index + 1 else text
        if not _shows(where, message["content"]):
            raise Unusable(f"the chat template leaves out message {number} (by {message['role']})")
        for call in message.get("tool_calls", ()):
            parts = [call["function"]["name"], *leaves(call["function"]["arguments"])]
            if not all(_shows(where, part) for part in parts):
                raise Unusable(f"the chat template leaves out a tool call of message {number}")
    answer, said = renderer.messages[index], text[start:]
    if not _shows(said, answer.get("reasoning_content", "")):
        raise Unusable(f"the chat template leaves out the reasoning of message {index + 1}")
    no_content = "tool_calls" in answer and not answer["content"] and renderer.spelling.no_content is None
    if no_content and "None" in said and "None" not in json.dumps(answer):
        raise Unusable(f"the chat template writes a word for the missing content of message {index + 1}")


def _shows(text: str, part: str) -> bool:
    part = part.strip()
    return (
        part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text
    )
