"""Worked solutions of some generators' questions: what a model can learn to think before it learns by reward.

The steps are computed here from the question, and only a solution that ends in the item's own answer is given out.
Each step is a line short enough for a small model: two digits are added or taken away at once; longer numbers
digit by digit from the right with the carry written out, where every digit follows from three numbers in sight (Lee et
al., arXiv:2307.03381, find that such steps are what makes small models learn arithmetic).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import gcd

from farthing.tasks.extract import plain_form
from farthing.tasks.item import Convention, Item

_AT_ONCE = 10  # sums of numbers below this are one step


def solve(item: Item) -> tuple[str, str] | None:
    """(thinking, answer): steps, one a line, that lead to the item's answer; None for a question not solved here.

    A row of data may have its solution with it, as GSM8K's do.

    Not solved are generators without an entry in `SOLVABLE`, and questions whose gold answer is not the value of what
    they ask (basic_arithmetic without parentheses has some: it divides by another number than it writes).
    """
    if item.metadata["scorer"] == "rewards":
        solution = item.metadata.get("solution")
        return (solution, item.answer) if solution else None
    solver = _SOLVERS.get(item.task)
    lines: list[str] = []
    answer = solver(item.question, lines) if solver else None
    return ("\n".join(lines), item.answer) if answer is not None and answer == item.answer.strip() else None


def solution_text(item: Item) -> str | None:
    """Question, steps and answer as plain text to pretrain on, or None."""
    solution = solve(item)
    if solution is None:
        return None
    thinking, answer = solution
    return f"{item.question.strip()}\n{thinking}\n{plain_form(answer, 'final')}\n"


def solution_conversation(
    item: Item, answer: Convention = "final", prompt: str = "{question}", system: str | None = None
) -> list[dict[str, str]] | None:
    """Question and `<think>` answer as messages to fine-tune on, or None.

    `answer`, `prompt` and `system` are those of the stage that will train on rewards later, so that it finds the
    questions in the same words and the answers where it looks for them.
    """
    solution = solve(item)
    if solution is None:
        return None
    said = f"<think>{solution[0]}</think>\n\n{plain_form(solution[1], item.convention(answer))}"
    asked = prompt.replace("{question}", item.asked)
    system = item.system or system
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]


# ---------------------------------------------------------------- one generator each


def _chain(question: str, lines: list[str]) -> str | None:
    """chain_sum: `… problem: 7 - 4 + 2 =`, by running totals."""
    return _value(question.rpartition(":")[2].strip().removesuffix("="), lines)


def _arithmetic(question: str, lines: list[str]) -> str | None:
    """basic_arithmetic: `Calculate ( 56 + -33 ) - 84.` in any of its wordings, innermost first."""
    found = re.search(r"[-(\d][-+*/()\d ]*", question)
    return _value(found[0], lines) if found else None


def _products(question: str, lines: list[str]) -> str | None:
    """products: `… multiplication: 60 * 93. Give …`."""
    return _value(question.partition(":")[2].partition(".")[0], lines)


def _gcd(question: str, lines: list[str]) -> str | None:
    """By Euclid's algorithm, one division a line."""
    first, *others = _numbers(question)
    for other in others:
        first = _euclid(first, other, lines)
    return str(first)


def _lcm(question: str, lines: list[str]) -> str | None:
    """The product over the greatest common divisor, dividing first."""
    first, *others = _numbers(question)
    for other in others:
        common = _euclid(first, other, lines)
        if common > 1:
            lines.append(f"{first} / {common} = {first // common}")
        first = _multiply(first // common, other, lines)
    return str(first)


def _equation(question: str, lines: list[str]) -> str | None:
    """simple_equations: `Solve for z: 34*z - 1190 = 2040`, also with the letter last or negated."""
    equation = question.rpartition(":" if ":" in question else "satisfies")[2]
    found = re.fullmatch(
        r"(?:(?P<before>\d+) (?P<first>[-+]) )?(?P<sign>-?)(?:(?P<times>\d+)\*)?(?P<letter>[a-z])"
        r"(?: (?P<then>[-+]) (?P<after>\d+))? = (?P<right>-?\d+)",
        equation.strip(),
    )
    if found is None or (found["before"] and found["after"]):
        return None
    letter, right, times = found["letter"], int(found["right"]), int(found["times"] or 1)
    if found["before"]:
        right = _add(right, "-", int(found["before"]), lines)
        times *= -1 if found["first"] == "-" else 1
    elif found["after"]:
        right = _add(right, "-" if found["then"] == "+" else "+", int(found["after"]), lines)
    times *= -1 if found["sign"] else 1
    if times == 0 or right % times:
        return None
    if times != 1:
        written = {-1: f"-{letter}"}.get(times, f"{times}*{letter}")
        lines += [f"{written} = {right}", f"{right} / {times} = {right // times}"]
    lines.append(f"{letter} = {right // times}")
    return str(right // times)


def _backward(question: str, lines: list[str]) -> str | None:
    """spell_backward: the letters one by one, then from the end."""
    word = question.rpartition(": ")[2]
    lines += [" ".join(word), " ".join(reversed(word))]
    return word[::-1]


_SOLVERS: dict[str, Callable[[str, list[str]], str | None]] = {
    "basic_arithmetic": _arithmetic,
    "chain_sum": _chain,
    "gcd": _gcd,
    "lcm": _lcm,
    "products": _products,
    "simple_equations": _equation,
    "spell_backward": _backward,
}
SOLVABLE: tuple[str, ...] = tuple(_SOLVERS)


def _numbers(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question.partition(":")[2])]


# ---------------------------------------------------------------- steps


def _add(a: int, sign: str, b: int, lines: list[str]) -> int:
    """a + b or a - b in one line. Mixed signs are first rewritten as a sum or difference of positive numbers."""
    total = a + b if sign == "+" else a - b
    line = f"{a} {sign} {b}"
    if max(abs(a), abs(b)) >= _AT_ONCE and a and b:
        large, small = sorted((abs(a), abs(b)), reverse=True)
        added = (a < 0) == (b < 0 if sign == "+" else b > 0)
        plain = f"{large} + {small}" if added else f"{large} - {small}"
        if added and a >= 0 and b >= 0:
            plain, large, small = line, a, b
        if total < 0:
            plain = f"-({plain})"
        if plain != line:
            line += f" = {plain}"
        line += f": {' '.join(_columns(large, small, added))}"
    lines.append(f"{line} = {total}")
    return total


def _columns(large: int, small: int, added: bool) -> list[str]:
    """The digits of a sum or difference from the right, as in `7+5=12 2+8+1=11`; a borrowed 10 is added in front."""
    steps, carry = [], 0
    while large or small:
        (large, a), (small, b) = divmod(large, 10), divmod(small, 10)
        if added:
            digit = a + b + carry
            steps.append(f"{a}+{b}" + (f"+{carry}" if carry else "") + f"={digit}")
            carry = digit // 10
        else:
            lent = 10 if a < b + carry else 0
            steps.append(f"{a + lent}-{b}" + (f"-{carry}" if carry else "") + f"={a + lent - b - carry}")
            carry = lent // 10
    return steps


def _multiply(a: int, b: int, lines: list[str]) -> int:
    """a * b: at once for digits, else one line for each digit of b, and their sum."""
    if a < 0 or b < 0:
        sign = "-" if (a < 0) != (b < 0) else ""
        lines.append(f"{a} * {b} = {sign}({abs(a)} * {abs(b)})")
        product = _multiply(abs(a), abs(b), lines)
        return -product if sign else product
    if min(a, b) <= 1 or max(a, b) < 10:
        lines.append(f"{a} * {b} = {a * b}")
        return a * b
    if len(str(b)) > len(str(a)):
        a, b = b, a
    total: int | None = None
    for place, digit in enumerate(map(int, reversed(str(b)))):
        if digit == 0:
            continue
        part = digit * 10**place
        lines.append(f"{a} * {part}: {' '.join(_times_digit(a, digit))} = {a * part}")
        total = a * part if total is None else _add(total, "+", a * part, lines)
    assert total is not None
    return total


def _times_digit(a: int, digit: int) -> list[str]:
    """The digits of a * digit from the right, as in `7*8=56 4*8+5=37`."""
    steps, carry = [], 0
    for other in map(int, reversed(str(a))):
        value = other * digit + carry
        steps.append(f"{other}*{digit}" + (f"+{carry}" if carry else "") + f"={value}")
        carry = value // 10
    return steps


def _euclid(a: int, b: int, lines: list[str]) -> int:
    """The greatest common divisor, as in `760 = 2 * 368 + 24`, until the remainder is 0."""
    a, b = max(a, b), min(a, b)
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    assert a == gcd(a, b)
    return a


# ---------------------------------------------------------------- expressions


def _value(expression: str, lines: list[str]) -> str | None:
    """The value of an expression in + - * / and parentheses, division rounding down as the generators' does."""
    if re.search(r"[^-+*/()\d\s]", expression):
        return None
    tokens = re.findall(r"\d+|[-+*/()]", expression)
    try:
        value, rest = _sum(tokens, lines)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return str(value) if not rest else None


def _sum(tokens: Sequence[str], lines: list[str]) -> tuple[int, Sequence[str]]:
    value, tokens = _product(tokens, lines)
    while tokens and tokens[0] in "+-":
        sign = tokens[0]
        other, tokens = _product(tokens[1:], lines)
        value = _add(value, sign, other, lines)
    return value, tokens


def _product(tokens: Sequence[str], lines: list[str]) -> tuple[int, Sequence[str]]:
    value, tokens = _factor(tokens, lines)
    while tokens and tokens[0] in "*/":
        sign = tokens[0]
        other, tokens = _factor(tokens[1:], lines)
        if sign == "*":
            value = _multiply(value, other, lines)
        else:
            exact = "" if value % other == 0 else " rounded down"
            lines.append(f"{value} / {other}{exact} = {value // other}")
            value //= other
    return value, tokens


def _factor(tokens: Sequence[str], lines: list[str]) -> tuple[int, Sequence[str]]:
    """A number, a group, or either with a minus. Raises ValueError or IndexError where there is none."""
    if tokens[0] == "-":
        value, tokens = _factor(tokens[1:], lines)
        return -value, tokens
    if tokens[0] != "(":
        return int(tokens[0]), tokens[1:]
    value, tokens = _sum(tokens[1:], lines)
    if tokens[0] != ")":
        raise ValueError("a group is not closed")
    return value, tokens[1:]
