"""Numbers as people write them, read one way only.

A piece of text gives a number when it holds exactly one, and nothing that might be another. Where a reader
could hesitate (a dash that may be a minus or a hyphen, a superscript, a digit glued to a letter) there is no
number. Everything here takes time linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

_NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_LATEX_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))")
_MINUS = "-−–"
_SIGNS = _MINUS + "+"
_WRAPPERS = "{$*(`£€\\"  # may stand between a sign and its number: -$7$, \boxed{-7}, -(7), **7**
_OPERATORS = "±√^/×÷·≠"  # what precedes an operand, not an answer
_LONGEST = 400  # characters; longer numbers are no answer to any task here
_BEFORE = 24  # characters looked at in front of a number


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
    """Whether the text holds any numeric character at all."""
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
    """ "-" or "" for the number that follows `before`; None where it cannot be told."""
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
