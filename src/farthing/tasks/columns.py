"""What a row of data asks, and its right answer: columns, templates over them, markers, options to choose from.

Templates are filled in by hand, not by str.format: what a row holds is never code, nor a format of its own.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import nearest
from farthing.data.rows import Row
from farthing.recipe import Gold

LETTERS = string.ascii_uppercase
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ARITHMETIC = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator, arXiv:2110.14168
_MARKER = "####"
# Columns in use elsewhere, by how sure their name is: TRL's prompt and solution, verl's reward_model.ground_truth.
_QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "Question", "Problem")
_ANSWERS = (
    "answer",
    "reward_model.ground_truth",
    "ground_truth",
    "solution",
    "final_answer",
    "answerKey",
    "Answer",
)
_CHOICES = ("choices", "options")


class Unusable(ValueError):
    """A row that cannot be asked; its text says why."""


class Template:
    """A column by its bare name, or a text with columns in braces; a column of a column is `a.b`.

    Raises UserError for a brace without its other half; `{{` and `}}` are braces.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.bare = "{" not in text and "}" not in text
        self.columns: list[str] = []
        self._parts: list[tuple[str, str | None]] = []  # a text, and the column after it
        if self.bare:
            self.columns = [text]
            return
        said, start = "", 0
        for found in _FIELD.finditer(text):
            said += text[start : found.start()]
            start = found.end()
            if found[1] is not None and found[1].strip():
                self.columns.append(found[1].strip())
                self._parts.append((said, found[1].strip()))
                said = ""
            elif found[0] in ("{{", "}}"):
                said += found[0][0]
            else:
                raise UserError(
                    f"{where}: {found[0]!r} in {text!r} names no column; write {{column}}, and {{{{ }}}} for braces"
                )
        self._parts.append((said + text[start:], None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for a row. Raises Unusable where a column is missing, null or no text."""
        if self.bare:
            return text_of(value_at(row, self.text), self.text)
        return "".join(
            said + (text_of(value_at(row, column), column) if column else "") for said, column in self._parts
        )


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of `a.b`, or of entry `a.0` of a list. Raises Unusable if it is missing or null."""
    if column in row:
        value: Any = row[column]
    else:
        value = row
        for part in column.split("."):
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = None
    if value is None:
        raise Unusable(f"it has no {column!r}")
    return value


def text_of(value: Any, column: str) -> str:
    """A value as a text: a number as written, the user's words of a conversation, a list of texts as lines.

    Raises Unusable for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return _asked(value, column)
    raise Unusable(f"its {column!r} is neither a text nor a conversation")


def _asked(turns: Sequence[Mapping[str, Any]], column: str) -> str:
    """What the user says in a conversation of one question; `system_of` has the rest."""
    turns = [turn for turn in turns if turn["role"] not in ("system", "developer")]
    if len(turns) != 1 or turns[0]["role"] != "user":
        raise Unusable(f"its {column!r} is no single question of the user")
    content = turns[0].get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise Unusable(f"its {column!r} asks with something else than text")
    return content


@dataclass(frozen=True)
class Asked:
    """One row, read."""

    question: str
    answer: str
    choices: list[str] | None
    """The options in their order; the answer is then the letter of one."""
    solution: str | None
    """The text in which the answer was found, where it is more than the answer."""
    system: str | None
    """The system message of a prompt that is a conversation."""


class Reading:
    """How to read rows. Made by `reading`."""

    def __init__(self, question: Template, answer: Gold | None, choices: str | None, where: str) -> None:
        self.question, self.gold, self.choices = question, answer, choices
        self.answer = Template(answer.column, f"{where}: answer") if answer else None

    def read(self, row: Row) -> Asked:
        """The question and answer of a row. Raises Unusable, which says why it has none."""
        options = self.options(row)
        with_lines = {**row, "choices": _lines(options)} if options else row
        question = self.question.fill(row if self.question.bare else with_lines).strip()
        if not question:
            raise Unusable("its question is empty")
        if options and self.question.bare:
            question = f"{question}\n{_lines(options)}"
        answer, solution = self._answer(row, options)
        return Asked(question, answer, options, solution, self._system(row))

    def options(self, row: Row) -> list[str] | None:
        """The options of a row. Raises Unusable where they are no list of texts."""
        return _options(value_at(row, self.choices), self.choices)[0] if self.choices else None

    @cached_property
    def columns(self) -> list[str]:
        """Every column that is read."""
        answers = self.answer.columns if self.answer else []
        return [*self.question.columns, *answers, *([self.choices] if self.choices else [])]

    def _answer(self, row: Row, options: list[str] | None) -> tuple[str, str | None]:
        if self.gold is None or self.answer is None:
            return "", None
        if options and self.answer.bare:
            assert self.choices is not None
            labels = _options(value_at(row, self.choices), self.choices)[1]
            return LETTERS[_chosen(value_at(row, self.gold.column), options, labels)], None
        whole = self._gold(row)
        if self.gold.after is not None:
            before, found, answer = whole.rpartition(self.gold.after)
            if not found:
                raise Unusable(f"its answer has no {self.gold.after!r}")
            solution = before
        elif self.gold.boxed:
            boxed = last_boxed(whole)
            if boxed is None:
                raise Unusable("its answer has no \\boxed{…}")
            answer, solution = boxed, whole
        else:
            answer, solution = whole, ""
        if not answer.strip():
            raise Unusable("its answer is empty")
        return answer.strip(), _ARITHMETIC.sub("", solution).strip() or None

    def _gold(self, row: Row) -> str:
        assert self.answer is not None
        if not self.answer.bare:
            return self.answer.fill(row)
        value = value_at(row, self.answer.text)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return (
            json.dumps(value, ensure_ascii=False)
            if isinstance(value, list | dict)
            else text_of(value, "answer")
        )

    def _system(self, row: Row) -> str | None:
        """The system message of a prompt that is a conversation."""
        turns = row.get(self.question.text) if self.question.bare else None
        said = [
            turn.get("content")
            for turn in (turns if isinstance(turns, list) else [])
            if isinstance(turn, dict) and turn.get("role") in ("system", "developer")
        ]
        return said[0] if said and isinstance(said[0], str) else None


def reading(
    question: str | None,
    answer: Gold | None,
    choices: str | None,
    sample: Sequence[Row],
    where: str,
    needs_answer: bool,
) -> Reading:
    """How to read rows such as those of `sample`; what is None is found by the names in use.

    Args:
        where: what the sentences about mistakes begin with.
        needs_answer: without it a missing answer column is no mistake.

    Raises:
        UserError: that names a column that is missing, those there are and the nearest.
    """
    if choices is None:
        choices = next(
            (name for name in _CHOICES if any(_are_options(row.get(name)) for row in sample)), None
        )
    if question is None:
        question = _found("question", _QUESTIONS, sample, where)
    if answer is None and needs_answer:
        answer = _how(_found("answer", _ANSWERS, sample, where), sample)
    elif answer is None:
        names = [name for name in _ANSWERS if _has(sample, name)]
        answer = _how(names[0], sample) if names else None
    made = Reading(Template(question, f"{where}: question"), answer, choices, where)
    own = {"choices"} if choices and not made.question.bare else set()
    for key, columns in (
        ("question", made.question.columns),
        ("answer", made.answer.columns if made.answer else []),
        ("choices", [choices] if choices else []),
    ):
        for column in columns:
            if column not in own and not _has(sample, column):
                raise UserError(f"{where}: {key}: there is no column {column!r}; {_columns(column, sample)}")
    return made


def _has(sample: Sequence[Row], column: str) -> bool:
    for row in sample:
        try:
            value_at(row, column)
            return True
        except Unusable:
            continue
    return False


def _found(key: str, names: Sequence[str], sample: Sequence[Row], where: str) -> str:
    found = next((name for name in names if _has(sample, name)), None)
    if found is None:
        raise UserError(
            f"{where}: no column is known as the {key}; say {key}: COLUMN ({_columns('', sample)})"
        )
    return found


def _columns(wanted: str, sample: Sequence[Row]) -> str:
    """The columns there are, and the nearest to the one wanted."""
    names: dict[str, None] = {}
    for row in sample:
        for name, value in row.items():
            names[name] = None
            if isinstance(value, dict):
                names |= dict.fromkeys(f"{name}.{inner}" for inner in value)
    listed = ", ".join(list(names)[:20]) + (", …" if len(names) > 20 else "")
    hint = nearest(wanted, list(names))
    return (f"{hint} " if hint else "") + f"there are {listed or 'none'}"


def _how(column: str, sample: Sequence[Row]) -> Gold:
    """A column nobody said how to read: after GSM8K's marker or in \\boxed{} if every answer of the sample has that."""
    texts = [row.get(column) for row in sample if row.get(column) is not None]
    if texts and all(isinstance(text, str) and _MARKER in text for text in texts):
        return Gold(column=column, after=_MARKER)
    if texts and all(isinstance(text, str) and last_boxed(text) is not None for text in texts):
        return Gold(column=column, boxed=True)
    return Gold(column=column)


def last_boxed(text: str) -> str | None:
    r"""What the last whole \boxed{…} of a text holds."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[start + 1 :], flags=re.S):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return text[start + len("\\boxed{") : start + 1 + brace.start()]
        start = text.rfind("\\boxed{", 0, start)
    return None


# ---- options ----


def _lines(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _are_options(value: Any) -> bool:
    try:
        _options(value, "")
    except Unusable:
        return False
    return True


def _options(value: Any, column: str) -> tuple[list[str], list[str] | None]:
    """Options and their labels: a list of texts, ARC's {"text": […], "label": […]}, {"A": "…"}, or either as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    labels: Any = None
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value, labels = value["text"], value.get("label")
    elif isinstance(value, dict) and list(value) == list(LETTERS[: len(value)]):
        value, labels = list(value.values()), list(value)
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        value = [json.dumps(one) for one in value]
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise Unusable(f"its {column!r} is no list of texts")
    if not 2 <= len(value) <= len(LETTERS):
        raise Unusable(f"its {column!r} has {len(value)} options where 2 to 26 belong")
    known = isinstance(labels, list) and len(labels) == len(value)
    return value, [str(label) for label in labels] if known else None


def _chosen(gold: Any, options: Sequence[str], labels: Sequence[str] | None) -> int:
    """Which option is right: a number is its place from 0 (MMLU); a text its label, the option itself, its place
    (HellaSwag) or its letter."""
    text = str(gold).strip()
    if isinstance(gold, int) and not isinstance(gold, bool) and not labels and 0 <= gold < len(options):
        return gold
    if labels and text in labels:
        return labels.index(text)
    if text in options:
        return options.index(text)
    places = [str(place) for place in range(len(options))] if not labels else []
    for names in (places, LETTERS[: len(options)]):
        if text.upper() in names and text and not isinstance(gold, bool):
            return names.index(text.upper())
    raise Unusable("its answer names none of the options")
