"""What a row of data asks, and its right answer: columns, templates over them, markers, options to choose from.

Templates are filled in by hand, not by str.format: what a row holds is never code, nor a format of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import nearest
from farthing.data.rows import Row
from farthing.data.shapes import ANSWER, SHAPES
from farthing.recipe import Gold
from farthing.recipe.draft import Holds
from farthing.tasks.rewards.choice import letter_of

LETTERS = string.ascii_uppercase
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ARITHMETIC = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator, arXiv:2110.14168
_MARKER = "####"
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$.,]+))")
_OWN_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):])\s*")  # before an option, as AQuA writes it
# Columns in use elsewhere, in whatever case, by how sure their name is: TRL's prompt and solution, verl's
# reward_model.ground_truth, Alpaca's instruction and output.
_QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
_ANSWERS = (
    "answer",
    "reward_model.ground_truth",
    "ground_truth",
    "solution",
    "final_answer",
    "answerkey",
    "gold",
    "target",
    "output",
    "label",
)
_CHOICES = ("choices", "options")
# shapes with all that is said
_TALKS = ("segments", "messages", "preference", "alpaca", "unpaired preference")


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
        self.first = 0
        """The number of the first option, where answers are numbers."""

    def read(self, row: Row) -> Asked:
        """The question and answer of a row. Raises Unusable, which says why it has none."""
        options = self.options(row)
        with_lines = {**row, "choices": option_lines(options)} if options else row
        question = self.question.fill(row if self.question.bare else with_lines).strip()
        if not question:
            raise Unusable("its question is empty")
        if options and self.question.bare:
            question = f"{question}\n{option_lines(options)}"
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
            return LETTERS[_chosen(value_at(row, self.gold.column), options, labels, self.first)], None
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
            (name for name in _known(_CHOICES, sample) if any(map(_are_options, _values(name, sample)))), None
        )
    if question is None:
        question = _found("question", _QUESTIONS, sample, where)
        context = next(_known(("input",), sample), None)
        if question.casefold() == "instruction" and context and any(_values(context, sample)):
            question = f"{{{question}}}\n{{{context}}}"  # Alpaca's: what the instruction is about
    if answer is None and needs_answer:
        answer = _how(_found("answer", _ANSWERS, sample, where), sample)
    elif answer is None:
        found = next(_known(_ANSWERS, sample), None)
        answer = _how(found, sample) if found else None
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
    if choices is not None and made.answer is not None and made.answer.bare:
        made.first = _counts_from(made.answer.text, choices, sample)
    return made


def _has(sample: Sequence[Row], column: str) -> bool:
    return any(True for _ in _values(column, sample))


def _known(names: Sequence[str], sample: Sequence[Row]) -> Iterator[str]:
    """The columns of a sample that have one of the names, in the order of these, whatever their case."""
    written = {column.casefold(): column for row in sample for column in row}
    for name in names:
        first, dot, rest = name.partition(".")
        column = written.get(first, first) + dot + rest
        if _has(sample, column):
            yield column


def _values(column: str, sample: Sequence[Row]) -> Iterator[Any]:
    """What a column has in the rows where it is there and not null."""
    for row in sample:
        with contextlib.suppress(Unusable):
            yield value_at(row, column)


def _found(key: str, names: Sequence[str], sample: Sequence[Row], where: str) -> str:
    found = next(_known(names, sample), None)
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
    """A column nobody said how to read: after GSM8K's marker or in \\boxed{} if most answers of the sample have that.
    Then a row without it is left out; the answers of all the others do not become whole texts for its sake."""
    texts = [value for value in _values(column, sample) if isinstance(value, str)]
    if sum(_MARKER in text for text in texts) > len(texts) / 2:
        return Gold(column=column, after=_MARKER)
    if sum(last_boxed(text) is not None for text in texts) > len(texts) / 2:
        return Gold(column=column, boxed=True)
    return Gold(column=column)


def last_boxed(text: str) -> str | None:
    r"""What the last whole \boxed{…} of a text holds. MATH's solutions also have \boxed 9 and \fbox{9}."""
    for start in reversed(list(_BOX.finditer(text))):
        if start[1]:
            return start[1]
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start.end() :], flags=re.S):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[start.end() : start.end() + brace.start()]
    return None


def holds(columns: Sequence[str]) -> Holds:
    """What rows with these columns are good for; "nothing" where their names do not tell."""
    names = {column.casefold(): "x" for column in columns}
    shape = next((shape.name for shape in SHAPES if shape.fits(names)), "prompt-only")
    answer = next((name for name in ANSWER if name in names), None)
    if shape in _TALKS or answer not in (None, *_ANSWERS):
        return "conversations"
    asked = [any(name.partition(".")[0] in names for name in known) for known in (_QUESTIONS, _ANSWERS)]
    if all(asked):
        return "questions"
    return "text" if shape == "text" else "nothing"


# ---- options ----


def option_lines(options: Sequence[str]) -> str:
    """Options as a question shows them, a line each."""
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
        labels = labels or value  # 2 is then the option 2, not the third
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise Unusable(f"its {column!r} is no list of texts")
    if not 2 <= len(value) <= len(LETTERS):
        raise Unusable(f"its {column!r} has {len(value)} options where 2 to 26 belong")
    own = [_OWN_LETTER.match(option) for option in value]
    if [(found[1] or found[2]).upper() for found in own if found] == list(LETTERS[: len(value)]):
        value = [option[found.end() :] for option, found in zip(value, own, strict=True) if found]
    known = isinstance(labels, list) and len(labels) == len(value)
    return value, [str(label) for label in labels] if known else None


def _counts_from(column: str, choices: str, sample: Sequence[Row]) -> int:
    """The number of the first option where answers are numbers: 0, or 1 where one is the number of options and none
    is 0."""
    numbers: set[int] = set()
    last = False
    for row in sample:
        with contextlib.suppress(Unusable, ValueError, TypeError, OverflowError):
            options, labels = _options(value_at(row, choices), choices)
            gold = value_at(row, column)
            if labels or isinstance(gold, bool) or (isinstance(gold, str) and gold.strip() in options):
                continue
            numbers.add(int(gold))
            last = last or int(gold) == len(options)
    return int(last and 0 not in numbers)


def _chosen(gold: Any, options: Sequence[str], labels: Sequence[str] | None, first: int) -> int:
    """Which option is right: a number is its place from `first` (0 in MMLU and HellaSwag); a text its label, the option
    itself, its place, or its letter, with the option behind it or not."""
    if isinstance(gold, list) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, float) and gold.is_integer():  # a column of integers with gaps, as pandas writes it
        gold = int(gold)
    text = str(gold).strip()
    if (
        isinstance(gold, int)
        and not isinstance(gold, bool)
        and not labels
        and 0 <= gold - first < len(options)
    ):
        return gold - first
    if labels and text in labels:
        return labels.index(text)
    if text in options:
        return options.index(text)
    places = [str(first + place) for place in range(len(options))] if not labels else []
    if text in places:
        return places.index(text)
    letter = letter_of(text, options) if isinstance(gold, str | bool) else None
    if letter is None:
        raise Unusable("its answer names none of the options")
    return LETTERS.index(letter)
