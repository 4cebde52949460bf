"""Reading the answer from a completion, by one of three conventions.

final   the last thing said: "3 + 4 = 7", "The answer is 7.", "#### 7"
tag     <answer>7</answer>, once, at the end (DeepSeek-R1's form, arXiv:2501.12948, section 2.3)
boxed   \\boxed{7}, once, with no number after it

All are strict on purpose: of a text with two answers none is read, so listing answers earns nothing. Only the last
20,000 characters are read, in linear time.
"""

from __future__ import annotations

import re
from typing import Literal

from farthing.base.errors import UserError
from farthing.tasks.item import CONVENTIONS, Convention
from farthing.tasks.numbers import has_number, one_number, same_number

Kind = Literal["integer", "text", "expression"]

LOOKED_AT = 20_000  # characters
PUNCTUATION = " \t\r\n.,;:!?\"'`*$“”‘’"
# Words before an answer. Each branch begins with a plain character, which lets the search skip ahead:
# three times faster than with \b in front and IGNORECASE.
_IS = r"[iI][sS]\b(?<!\w[iI][sS])"
_ARE = r"[aA][rR][eE]\b(?<!\w[aA][rR][eE])"
_ANSWER = r"[aA][nN][sS][wW][eE][rR]\b(?<!\w[aA][nN][sS][wW][eE][rR])"
_HASHES = r"\#\#\#\#(?=[^\w\n]*[0-9])"  # before the answers of GSM8K (arXiv:2110.14168)
_BEFORE_NUMBER = re.compile(rf"=(?<![!<>=]=)|:(?<![0-9]:)|:(?![0-9])|{_IS}|{_ARE}|{_ANSWER}|{_HASHES}")
_BEFORE_TEXT = re.compile(rf":|{_IS}")


def extract(text: str, convention: Convention, kind: Kind = "integer") -> str | None:
    """The answer the completion gives, or None when it gives none or more than one.

    `kind` says what `final` looks for: a number for "integer" (returned in canonical form), else the rest of
    the last line. `tag` and `boxed` return their content, whatever it is.

    Raises UserError for a convention that does not exist.
    """
    _check(convention)
    text = tail(text)
    if convention == "tag":
        return _tag(text)
    if convention == "boxed":
        return _boxed(text)
    return _final_number(text) if kind == "integer" else _final_text(text)


def plain_form(answer: str, convention: Convention) -> str:
    """The plainest completion that gives `answer` in the convention."""
    _check(convention)
    return {
        "final": f"The answer is {answer}",
        "tag": f"<answer>{answer}</answer>",
        "boxed": f"\\boxed{{{answer}}}",
    }[convention]


def tail(text: str) -> str:
    """The part of a completion that is read: its end, from the first whole word on."""
    if len(text) <= LOOKED_AT:
        return text
    end = text[-LOOKED_AT:]
    space = re.search(r"\s", end)
    return end[space.start() :] if space else end


def without_echo(text: str, question: str) -> str:
    """The text without copies of the question."""
    question = question.strip()
    return text.replace(question, "\n") if question and question in text else text


def _check(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise UserError(f"answer: there is no convention {convention!r}; choose {' or '.join(CONVENTIONS)}")


def _final_number(text: str) -> str | None:
    start = 0
    for marker in _BEFORE_NUMBER.finditer(text):
        start = marker.end()
    number = same_number(text[start:]) if start else None
    return number if number is not None else one_number(text)


def _final_text(text: str) -> str | None:
    line = text.rstrip().rpartition("\n")[2]
    start = 0
    for marker in _BEFORE_TEXT.finditer(line):
        start = marker.end()
    return line[start:].strip(PUNCTUATION).strip() or None


def _tag(text: str) -> str | None:
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or after.strip() or "<think>" in answer or "</think>" in answer:
        return None
    if before.rfind("<think>") > before.rfind("</think>"):
        return None  # still thinking
    return answer.strip() or None


def _boxed(text: str) -> str | None:
    if text.count("\\boxed") != 1:
        return None
    rest = text.partition("\\boxed")[2]
    if not rest.startswith("{"):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", rest):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            answer, after = rest[1 : brace.start()], rest[brace.end() :]
            return None if has_number(after) else answer.strip() or None
    return None
