"""Arithmetic puzzles (countdown, 24): a safe parser for model output, which is never run as code.

sum    = term   { ("+" | "-") term }
term   = factor { ("*" | "/") factor }
factor = [ "-" ] ( integer | "(" sum ")" )
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction

_LENGTH = 500  # characters
_DEPTH = 32  # nested parentheses
_DIGITS = 12  # of one integer
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
_SPELLINGS = {
    "\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "",
    "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-",
}  # fmt: skip


class _Malformed(Exception):
    """The text is not an expression of the grammar."""


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.numbers: list[int] = []

    def next_is(self, choices: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at] in choices

    def take(self) -> str:
        if self.at == len(self.tokens):
            raise _Malformed
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self, depth: int) -> Fraction:
        value = self.term(depth)
        while self.next_is("+-"):
            value = value + self.term(depth) if self.take() == "+" else value - self.term(depth)
        return value

    def term(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.next_is("*/"):
            value = value * self.factor(depth) if self.take() == "*" else value / self.factor(depth)
        return value

    def factor(self, depth: int) -> Fraction:
        token = self.take()
        if token == "-":
            if self.next_is("-"):
                raise _Malformed
            return -self.factor(depth)
        if token == "(":
            if depth == 0:
                raise _Malformed
            value = self.sum(depth - 1)
            if self.take() != ")":
                raise _Malformed
            return value
        if not token[0].isdigit():
            raise _Malformed
        self.numbers.append(int(token))
        return Fraction(int(token))


def tidy(text: str) -> str | None:
    """The expression in ASCII operators and without outer white space, or None when it is too long."""
    if len(text) > _LENGTH:
        return None
    for written, meant in _SPELLINGS.items():
        text = text.replace(written, meant)
    return text.strip()


def evaluate(text: str) -> tuple[Fraction | None, list[int]] | None:
    """The exact value of an expression and the integers in it, in order; None if it is not an expression.

    The value is None where a division by zero leaves it undefined. `**`, `//`, decimals, leading zeros,
    implied multiplication and names are not part of the grammar.
    """
    tokens: list[str] = []
    at = 0
    text = text.rstrip()
    if len(text) > _LENGTH:
        return None
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        number = match[1]
        if number and (len(number) > _DIGITS or (number[0] == "0" and number != "0")):
            return None
        tokens.append(number or match[2])
        at = match.end()
    parser = _Parser(tokens)
    value: Fraction | None
    try:
        value = parser.sum(_DEPTH)
    except _Malformed:
        return None
    except ZeroDivisionError:
        return None, [int(token) for token in tokens if token[0].isdigit()]
    return (value, parser.numbers) if parser.at == len(tokens) else None


def solves(text: str, numbers: Sequence[int], target: int, operators: Collection[str]) -> bool | None:
    """Whether the expression makes `target` from every given number, each exactly as often as given.

    Both puzzles say "using all of these numbers" and "each only once". None if the text is not an expression.
    """
    result = evaluate(text)
    if result is None:
        return None
    value, used = result
    allowed = all(operator in operators for operator in "+-*/" if operator in text)
    return value == target and Counter(used) == Counter(numbers) and allowed
