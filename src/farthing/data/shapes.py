"""The shapes that conversations have in data: how a row is recognised, and what of it is learnt.

A shape is known by its columns. The table below is tried from the top; a source may name a shape instead.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import given
from farthing.data.messages import (
    REASONING,
    Conversation,
    Message,
    Passage,
    Unusable,
    checked,
    from_json,
    read_messages,
    read_tools,
    with_system,
)
from farthing.data.text import Problems, is_unicode, records

Row = dict[str, Any]
_NOTHING: tuple[Any, ...] = (None, "", [], {})
Learnable = Conversation | Passage

_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog")
_PROMPT, _QUESTION = ("prompt",), ("question", "query", "problem")
# a solution ends in its answer
ANSWER = ("completion", "response", "output", "solution", "answer", "generation")
_CONTEXT, _SYSTEM, _TOOLS = ("input", "context"), ("system", "system_prompt"), ("tools", "functions")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_OURS = {"messages", "add_generation_prompt", "tools"}
_NAMED = 8  # columns
_NOT_PAIRS = ("label", "labels", "chosen", "rejected", "completions")


class _Read(Row):
    """A row that knows which of its columns were read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


@dataclass(frozen=True)
class Shape:
    """A shape: its name, whether a row (with column names in lower case) has it, and how it is read."""

    name: str
    meaning: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Counter[str]], Learnable]


@dataclass
class Found:
    """What was recognised in the rows read so far."""

    shapes: Counter[str] = field(default_factory=Counter)
    """Rows by shape."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is there and not used, with how often."""
    columns: Counter[str] = field(default_factory=Counter)
    """Columns of the rows."""
    unused: Counter[str] = field(default_factory=Counter)
    """Those that hold something and are not used, with how often."""

    def lines(self) -> Iterator[str]:
        """A sentence for each thing that is not used."""
        if self.unused:
            yield self.columns_not_used
        for note, number in self.notes.most_common():
            yield f"{note} ({number:,} times)" if number > 1 else note

    @property
    def columns_not_used(self) -> str:
        """A sentence about them."""
        most = [name for name, _ in self.unused.most_common(_NAMED)]
        rest = f" and {len(self.unused) - _NAMED} more" if len(self.unused) > _NAMED else ""
        return f"columns that are not used: {', '.join(most)}{rest}"


def placed_conversations(
    source: str,
    problems: Problems,
    *,
    field: str | None = None,
    shape: str | None = None,
    found: Found | None = None,
) -> Iterator[tuple[Learnable, str]]:
    """The conversations of a source (as `text.documents` takes them, without .txt), each with its place, as in
    "chats.jsonl:12".

    Args:
        field: the column that has the messages or the text; None goes by the names that are in use.
        shape: the name of a shape that all rows have; None recognises each row.
        found: takes what is recognised.

    A row that cannot be used is reported, or raised as UserError, by the policy of `problems`.
    """
    if source.endswith(".txt"):
        raise UserError(
            f"{source} is plain text; conversations come as rows with messages, or with a prompt and a completion"
        )
    found = found if found is not None else Found()
    for row, place in records(source, None, problems):
        try:
            chosen, lowered = _chosen(row, field, shape)
            found.columns.update(key for key, value in row.items() if value is not None)
            found.shapes[chosen.name] += 1
            learnable = chosen.read(lowered, found.notes)
            if isinstance(learnable, Conversation):
                learnable = checked(learnable)
            elif not is_unicode(learnable.text):
                raise Unusable("the text holds half a character (a lone surrogate)")
        except Unusable as error:
            problems.broken(place, str(error))
            continue
        found.unused.update(
            key for key, value in lowered.items() if key not in lowered.read and value not in _NOTHING
        )
        yield learnable, place


def _chosen(row: Row, field: str | None, name: str | None) -> tuple[Shape, _Read]:
    row = _Read({str(key).lower(): value for key, value in row.items() if value is not None})
    if field is not None:
        if field.lower() not in row:
            raise Unusable(f"the row has no {field!r} (it has {_columns(row)})")
        value = from_json(row.pop(field.lower()))
        row["text" if isinstance(value, str) else "messages"] = value
    for key in _MEDIA:
        if row.get(key):
            raise Unusable(f"the row has a column {key!r}; only text is read")
    if name is not None:
        shape = next(shape for shape in SHAPES if shape.name == name)
        if not shape.fits(row):
            raise Unusable(
                f"the row does not have the shape {name}: {shape.meaning} (it has {_columns(row)})"
            )
        return shape, row
    for shape in SHAPES:
        if shape.fits(row):
            return shape, row
    raise Unusable(f"the row has no conversation that is recognised (it has {_columns(row)})")


def _columns(row: Row) -> str:
    return (", ".join(map(given, list(row)[:8])) + (", …" if len(row) > 8 else "")) or "nothing"


# ---------------------------------------------------------------- how each shape is read


def _first(row: Row, keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def _has(row: Row, *groups: tuple[str, ...]) -> bool:
    return all(any(key in row for key in keys) for keys in groups)


def _text(row: Row, keys: tuple[str, ...]) -> str:
    key = next(key for key in keys if key in row)
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise Unusable(f"its {key!r} is not text")
    return value


def _whole(
    row: Row, messages: list[Message], learnt: list[bool], plain: Passage | None = None
) -> Conversation:
    messages, learnt = with_system(messages, learnt, _first(row, _SYSTEM))
    tools = read_tools(_first(row, _TOOLS))
    if plain is not None:  # as a question is asked of a model without a template
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        plain = Passage(((f"{system}\n", False), *plain.pieces)) if system else plain
        thinks = any("reasoning_content" in turn and "inline" not in turn for turn in messages)
        plain = None if tools or thinks else plain
    variables = from_json(row.get("chat_template_kwargs")) or {}
    if not isinstance(variables, dict) or not all(isinstance(key, str) for key in variables):
        raise Unusable("its 'chat_template_kwargs' is not an object")
    if taken := _OURS & variables.keys():
        raise Unusable(f"its 'chat_template_kwargs' sets {min(taken)}, which the conversation itself decides")
    return Conversation(messages, learnt, tools, variables, plain)


def _read_messages(row: Row, notes: Counter[str]) -> Conversation:
    return _whole(row, *read_messages(_first(row, _MESSAGES), notes))


def _turn(prompt: str, answer: str, reasoning: Any = None) -> tuple[list[Message], list[bool]]:
    said = {"role": "assistant", "content": answer.strip()}
    if reasoning and not said["content"].startswith("<think>"):
        said["reasoning_content"] = reasoning
    answer_message, learnt = read_messages([said], Counter())
    return [{"role": "user", "content": prompt.strip()}, *answer_message], [False, *learnt]


def _read_pair(
    row: Row, notes: Counter[str], prompts: tuple[str, ...], answers: tuple[str, ...]
) -> Conversation:
    """A prompt and what is learnt to follow it, each a text or messages; the latter may say the prompt again."""
    prompt, answer = _messages_or_text(_first(row, prompts)), _messages_or_text(_first(row, answers))
    if isinstance(prompt, list) or isinstance(answer, list | dict):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = answer if isinstance(answer, list) else [answer]
        said = [{"role": "assistant", "content": part} if isinstance(part, str) else part for part in said]
        before, _ = read_messages(asked, notes)
        after, learnt = read_messages(said, notes)
        lead = next((n for n, turn in enumerate(after) if turn["role"] not in ("system", "developer")), 0)
        start = lead + len(before)
        if after[lead:start] == before:  # UltraFeedback
            return _whole(row, after, [on and n >= start for n, on in enumerate(learnt)])
        return _whole(row, before + after, [False] * len(before) + learnt)
    question, completion = _text(row, prompts), _text(row, answers)
    if context := row.get("context"):
        question = f"{context}\n\n{question}"
    if not completion.strip():
        raise Unusable("an answer is empty")
    turn = _turn(question, completion, _first(row, REASONING))
    return _whole(row, *turn, Passage(((question, False), (completion, True))))


def _messages_or_text(value: Any) -> Any:
    """The messages that were written as JSON text; a text that is other JSON, as an answer may be, stays a text."""
    if not isinstance(value, str):
        return value
    found = from_json(value)
    turns = found if isinstance(found, list) else [found]
    are_turns = all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)
    return found if turns and are_turns else value


def _read_alpaca(row: Row, notes: Counter[str]) -> Conversation:
    asked, context = _text(row, ("instruction",)), _first(row, _CONTEXT)
    if context not in (None, ""):
        asked = f"{asked}\n{_text(row, _CONTEXT)}"
    messages: list[Message] = []
    learnt: list[bool] = []
    history = from_json(row.get("history")) or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise Unusable("its 'history' is not a list of pairs of texts")
    last = [asked, _text(row, ANSWER), _first(row, REASONING)]
    for question, answer, *reasoning in [*history, last]:
        more, on = _turn(question, answer, *reasoning)
        messages, learnt = messages + more, learnt + on
    return _whole(row, messages, learnt)


def _read_preference(row: Row, notes: Counter[str]) -> Conversation:
    notes["the column 'rejected' is not learnt from; 'chosen' is"] += 1
    rejected = from_json(row["rejected"])
    if "prompt" in row:
        return _read_pair(row, notes, _PROMPT, ("chosen",))
    chosen = from_json(row["chosen"])
    if isinstance(chosen, str) and isinstance(rejected, str):
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        shared = "".join(one for one, _ in pairs)
        prompt = shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1].rstrip(" ")
        row.update(prompt=prompt, chosen=chosen[len(prompt) :])
        return _read_pair(row, notes, _PROMPT, ("chosen",))
    messages, learnt = read_messages(chosen, notes)
    others, _ = read_messages(rejected, notes)
    shared_turns = next((n for n, (a, b) in enumerate(zip(messages, others, strict=False)) if a != b), 0)
    return _whole(row, messages, [on and n >= shared_turns for n, on in enumerate(learnt)])


def _read_unpaired(row: Row, notes: Counter[str]) -> Conversation:
    if row["label"] not in (0, 1):
        raise Unusable("its 'label' is not true or false")
    if not row["label"]:
        raise Unusable("its 'label' is false: the completion is one that is not wanted")
    return _read_pair(row, notes, _PROMPT, ("completion",))


def _read_segments(row: Row, notes: Counter[str]) -> Passage:
    pieces = from_json(row["segments"])
    if not isinstance(pieces, list) or not all(
        isinstance(piece, dict) and isinstance(piece.get("text"), str) and piece.get("label") in (0, 1)
        for piece in pieces
    ):
        raise Unusable("its 'segments' are not a list of {text, label}")
    if not any(piece["label"] for piece in pieces):
        raise Unusable("none of its segments is to be learnt")
    return Passage(tuple((piece["text"], bool(piece["label"])) for piece in pieces))


def _read_continuation(row: Row, notes: Counter[str]) -> Passage:
    prompt, answer = _text(row, (*_PROMPT, *_QUESTION)), _text(row, ANSWER)
    if not answer.strip():
        raise Unusable("the completion is empty")
    return Passage(((prompt, False), (answer, True)))


def _read_text(row: Row, notes: Counter[str]) -> Passage:
    text = _text(row, ("text",))
    if not text.strip():
        raise Unusable("the text is empty")
    return Passage(((text, True),))


def _refuse(why: str) -> Callable[[Row, Counter[str]], Learnable]:
    def read(row: Row, notes: Counter[str]) -> Learnable:
        raise Unusable(why)

    return read


SHAPES = (
    Shape("segments", "segments, a list of {text, label}, as axolotl's input_output",
          lambda row: "segments" in row, _read_segments),
    Shape("messages", "messages or conversations, a list of {role, content} or {from, value}",
          lambda row: _has(row, _MESSAGES), _read_messages),
    Shape("preference", "chosen and rejected, with a prompt or without; chosen is learnt",
          lambda row: _has(row, ("chosen",), ("rejected",)), _read_preference),
    Shape("alpaca", "instruction and output, maybe input, history and system",
          lambda row: _has(row, ("instruction",), ANSWER), _read_alpaca),
    Shape("unpaired preference", "prompt, completion and label; completions labelled true are learnt",
          lambda row: _has(row, _PROMPT, ("completion",), ("label",)), _read_unpaired),
    Shape("stepwise supervision", "prompt, completions and labels, which train a judge of steps",
          lambda row: _has(row, _PROMPT, ("completions",)),
          _refuse("it judges steps (prompt, completions, labels), which sft does not learn from")),
    Shape("prompt-completion", "prompt and completion or response, each a text or messages",
          lambda row: _has(row, _PROMPT, ANSWER) and not _has(row, _NOT_PAIRS),
          lambda row, notes: _read_pair(row, notes, _PROMPT, ANSWER)),
    Shape("question-answer", "question, query or problem, and answer or solution",
          lambda row: _has(row, _QUESTION, ANSWER),
          lambda row, notes: _read_pair(row, notes, _QUESTION, ANSWER)),
    Shape("text", "text, all of it learnt", lambda row: "text" in row, _read_text),
    Shape("prompt-only", "prompt alone, which has nothing to learn from",
          lambda row: _has(row, (*_PROMPT, *_QUESTION, "instruction")),
          _refuse("it is a prompt without an answer; sft needs answers, grpo takes questions as tasks")),
    Shape("continuation", "prompt and completion as plain text, without the chat template",
          lambda row: _has(row, (*_PROMPT, *_QUESTION), ANSWER), _read_continuation),
)  # fmt: skip
