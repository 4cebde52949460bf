"""Calls of tools in a model's own words: how each kind of chat template has them written, and reading them back.

A template says by its text which form its model was trained on. A model whose template knows no tools is told of them
in the system message, in Hermes's form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farthing.serve.protocol import Function
from farthing.serve.thinking import overlap

# One space after a comma or colon and no other: where any whitespace may stand, a small model writes it without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Form:
    """How a call is written: `open`, a body, `close`.

    Attributes:
        head, middle: text before the name and between name and arguments, where a body is not one JSON object.
        arguments: the key of the arguments in a body that is one JSON object.
        around: marks before the first call and after the last, where there are such.
        bare: an answer that is one JSON object is a call without marks.
    """

    open: str
    close: str
    arguments: str = "arguments"
    head: str | None = None
    middle: str = ""
    around: tuple[str, str] = ("", "")
    bare: bool = False

    def read(self, body: str) -> tuple[str, str] | None:
        """Name and arguments (JSON) of a call's body; None if it is not one."""
        if self.head is not None:
            name, found, arguments = body.removeprefix(self.head).partition(self.middle)
            parsed = _object(arguments)
            return (name.strip(), json.dumps(parsed)) if found and parsed is not None else None
        call = _object(body)
        if call is None or not isinstance(call.get("name"), str):
            return None
        given = call.get(self.arguments, call.get("parameters", {}))
        if isinstance(given, str):  # written twice over: JSON in a string
            given = _object(given)
        return (call["name"], json.dumps(given)) if isinstance(given, dict) else None

    def grammar(self, functions: Sequence[Function], special: Mapping[str, int], opening: bool) -> str:
        """Lark grammar of one call, with its closing mark.

        Args:
            special: the tokenizer's special tokens: a mark that is one is no text.
            opening: with its opening mark too.
        """
        before = [*self.around[:1], self.open] if opening else []
        start = [mark for mark in (_mark(text, special) for text in before) if mark]
        end = _mark(self.close, special)
        rules = []
        for place, f in enumerate(functions):
            if self.head is None:
                call = {
                    "type": "object",
                    "properties": {"name": {"const": f.name}, self.arguments: _schema(f)},
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
                body = [_json(call)]
            else:
                body = [json.dumps(self.head + f.name + self.middle), _json(_schema(f))]
            names = []
            for number, part in enumerate(body):
                names.append(f"part{place}_{number}")
                rules.append(f"{names[-1]}: {part}")
            rules.append(f"call{place}: {' '.join(names)}")
        calls = " | ".join(f"call{place}" for place in range(len(functions)))
        return "\n".join(
            [f"start: {' '.join([*start, 'call', *([end] if end else [])])}", f"call: {calls}", *rules]
        )


HERMES = Form("<tool_call>\n", "\n</tool_call>")
LLAMA = Form("<|python_tag|>", "", arguments="parameters", bare=True)
MISTRAL = Form("[TOOL_CALLS][", "]")
DEEPSEEK_V3 = Form(
    "<｜tool▁call▁begin｜>",
    "\n```<｜tool▁call▁end｜>",
    head="function<｜tool▁sep｜>",
    middle="\n```json\n",
    around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
DEEPSEEK_V31 = Form(
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    head="",
    middle="<｜tool▁sep｜>",
    around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)


def form_of(template: str) -> Form:
    """The form in which a chat template's model writes its calls; Hermes's if the template has none."""
    if "<｜tool▁call▁begin｜>" in template:
        return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|python_tag|>" in template:
        return LLAMA
    return HERMES


def told(functions: Sequence[Function]) -> str:
    """What a system message says of the tools to a model whose template has no place for them."""
    listed = "\n".join(json.dumps(described(f)["function"]) for f in functions)
    return (
        "You may call these functions. To call one, write nothing but\n"
        '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>\n'
        f"The functions, with the JSON schemas of their arguments:\n{listed}"
    )


def described(function: Function) -> dict[str, Any]:
    """A function as chat templates want it."""
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": _schema(function),
        },
    }


class Calls:
    """Finds calls in an answer that comes in pieces.

    Text that may be the beginning of a call is held back; what turns out not to be one is text after all.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self._open = form.open.strip()
        self._marks = [mark for mark in form.around if mark]
        self._held = ""
        self._inside = False
        self._found = self._said = False

    def push(self, piece: str) -> list[str | tuple[str, str]]:
        """What is now known: texts, and calls as (name, arguments)."""
        self._held += piece
        known: list[str | tuple[str, str]] = []
        if self._bare:
            return known
        while True:
            if self._inside:
                if not self._close_call(known):
                    return known
                continue
            marks = [self._open, *self._marks]
            at, mark = min(
                ((at, mark) for mark in marks if (at := self._held.find(mark)) >= 0), default=(-1, "")
            )
            if at < 0:
                break
            self._say(self._held[:at], known)
            self._held = self._held[at + len(mark) :]
            self._inside = mark == self._open
        keep = max(overlap(self._held, mark) for mark in marks)
        self._say(self._held[: len(self._held) - keep], known)
        self._held = self._held[len(self._held) - keep :]
        return known

    def flush(self) -> list[str | tuple[str, str]]:
        """The rest, at the end of the answer: a call that lacks only its closing mark, or text."""
        held, self._held = self._held, ""
        if not held.strip() and not self._inside:
            return []
        call = self.form.read(held) if self._inside or self.form.bare else None
        if call is not None:
            return [call]
        return [self._open + held if self._inside else held]

    @property
    def _bare(self) -> bool:
        """Whether the answer may be a call without marks, which only its end shows."""
        return self.form.bare and not self._said and not self._inside and self._held.lstrip().startswith("{")

    def _close_call(self, known: list[str | tuple[str, str]]) -> bool:
        """Read the call that is open; False while it is not complete."""
        close = self.form.close.strip()
        body, found, after = self._held.partition(close) if close else (self._held, "", "")
        if not found:
            return False
        call = self.form.read(body)
        known.append(call if call is not None else self._open + body + close)
        self._found = self._found or call is not None
        self._held, self._inside = after, False
        return True

    def _say(self, text: str, known: list[str | tuple[str, str]]) -> None:
        if text and not (self._found and not text.strip()):  # not the newlines between calls
            known.append(text)
            self._said = self._said or bool(text.strip())


def _mark(text: str, special: Mapping[str, int]) -> str:
    """A mark in a Lark grammar: special tokens by number, the rest as text."""
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]
    return " ".join(
        f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )


def _json(schema: dict[str, Any]) -> str:
    """JSON by a schema, in a Lark grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def _schema(function: Function) -> dict[str, Any]:
    return {"type": "object", "properties": {}} if function.parameters is None else function.parameters


def _object(text: str) -> dict[str, Any] | None:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, dict) else None
