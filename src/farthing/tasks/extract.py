"""Reading the answer from a completion, by one of three conventions.

final   the last thing said: "3 + 4 = 7", "The answer is 7."
tag     <answer>7</answer>, once, at the end (DeepSeek-R1's form, arXiv:2501.12948, section 2.3)
boxed   \\boxed{7}, once, with no number after it

All are strict on purpose: of a text with two answers none is read, so listing answers earns nothing. Only the last
20,000 characters are read, in linear time.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from farthing.base.errors import UserError
from farthing.tasks.item import CONVENTIONS, Convention

Kind = Literal["integer", "text", "expression"]

LOOKED_AT = 20_000  # characters
PUNCTUATION = " \t\r\n.,;:!?\"'`*$“”‘’"
# Words before an answer. Each branch begins with a plain character, which lets the search skip ahead:
# three times faster than with \b in front and IGNORECASE.
_IS = r"[iI][sS]\b(?<!\w[iI][sS])"
_ARE = r"[aA][rR][eE]\b(?<!\w[aA][rR][eE])"
_ANSWER = r"[aA][nN][sS][wW][eE][rR]\b(?<!\w[aA][nN][sS][wW][eE][rR])"
_BEFORE_NUMBER = re.compile(rf"=(?<![!<>=]=)|:(?<![0-9]:)|:(?![0-9])|{_IS}|{_ARE}|{_ANSWER}")
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


def _check(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise UserError(f"answer: there is no convention {convention!r}; choose {' or '.join(CONVENTIONS)}")


def _final_number(text: str) -> str | None:
    start = 0
    for marker in _BEFORE_NUMBER.finditer(text):
        start = marker.end()
    number = one_number(text[start:]) if start else None
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


_NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")


_LATEX_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))")


_MINUS = "-−–"


_SIGNS = _MINUS + "+"


_WRAPPERS = "{$*(`£€\\"  # may stand between a sign and its number: -$7$, \boxed{-7}, -(7), **7**


_OPERATORS = "±√^/×÷·≠"  # what precedes an operand, not an answer


_LONGEST = 400  # characters; no task here has a longer answer


_BEFORE = 24  # characters examined before a number


def one_number(text: str) -> str | None:
    """The only number in the text, in canonical form ("7", "-3", "7.5"), or None without exactly one.

    Thousands separators, a leading +, a unicode minus, trailing zeros of a fraction, units and wrappers of
    Markdown or LaTeX are understood. Only ASCII digits are digits: any other numeric character (full-width,
    superscript, a vulgar fraction) makes the text ambiguous.
    """
    if has_foreign_digits(text):
        return None
    text = _LATEX_THOUSANDS.sub(",", text)
    found = _NUMBER.finditer(text)
    match = next(found, None)
    if match is None or next(found, None) is not None:
        return None
    sign = _sign(text[max(0, match.start() - _BEFORE) : match.start()])
    if sign is None or len(match[0]) > _LONGEST:
        return None
    return canonical(sign, match[0])


def has_number(text: str) -> bool:
    """Whether the text holds any numeric character."""
    return _NUMBER.search(text) is not None or has_foreign_digits(text)


def has_foreign_digits(text: str) -> bool:
    """Whether the text holds a numeric character that is not one of 0 to 9."""
    if text.isascii():
        return False
    return any(char > "\x7f" and unicodedata.category(char)[0] == "N" for char in text)


def canonical(sign: str, digits: str) -> str:
    """One spelling for each value: equal numbers give equal text, so answers compare as text."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" or sign != "-" else f"-{value}"


def _sign(before: str) -> str | None:
    """ "-" or "" for the number that follows `before`; None if it is ambiguous."""
    if before[-1:].isalpha() or before.endswith("_"):
        return None  # part of a name: x7, H2
    core = before.rstrip(_WRAPPERS)
    if core.endswith("\\boxed"):
        core = core[: -len("\\boxed")].rstrip(_WRAPPERS)
    last = core[-1:]
    if not last or last in _OPERATORS:
        return None if last else ""
    if last in _SIGNS:
        earlier = core[-2:-1]
        if earlier.isalnum() or (earlier and earlier in ")]}._" + _SIGNS):
            return None  # a subtraction or a hyphen
        return "-" if last in _MINUS else ""
    if last in " \t" and core.rstrip(" \t")[-1:] in tuple(_SIGNS + _OPERATORS):
        return None  # "- 7": a minus, a bullet or a dash
    return ""
