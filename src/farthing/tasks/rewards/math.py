"""`math`: formulas compared by math-verify, which makes SymPy expressions of LaTeX without running any of it.

What is compared is one answer, read by the recipe's convention. Stricter than math-verify in one place: where the gold
answer is a plain number, a calculation that comes to it is not the answer, or `2 + 2` would be paid for a question that
asks what 2 + 2 is.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from farthing.recipe.rewards import Plain
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.numbers import one_number
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared, said

_LONGEST = 1000  # characters of an answer
_DEEPEST = 50  # brackets within each other
_BEFORE = re.compile(r":(?!\d)|(?<![<>!])=(?!=)|\b(?:is|are|answer|equals|be|to|get)\b", re.IGNORECASE)
_IN_DOLLARS = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_VARIABLE = re.compile(r"^\s*[a-zA-Z]\s*=(?!=)\s*")
_CALCULATES = re.compile(r"[+*^!/<>=≤≥√]|(?<=.)[-−]|\\(?!text|mathrm|%|\$|,|;|!|\s|left|right|circ|degree)")
_FRACTION = re.compile(
    r"[-−]?\s*(?:\d+\s*(?=\\|\d+/))?(?:\\[dt]?frac\s*\{?[-−]?\d+\}?\s*\{?\d+\}?|\d+\s*/\s*\d+)"
)
_WORDS = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{2,}")
_NAMES = re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbb|begin|end)\s*\{[^{}]*\}")
_TOWER = re.compile(
    r"(?:\^|\*\*)[^+,=]{0,40}?(?:\^|\*\*)|(?:\^|\*\*)\s*\{?\s*\(?\s*[-−]?\d{4,}|\d{4,}\s*\}?\)?!|!\s*\)*!"
)


def verify(item: Item, text: str, convention: Convention, settings: Plain) -> Part:
    gold = _bare(item.answer)
    if not gold or _parsed(gold) is None:
        return Part("bad_gold")
    answer = _read(said(item, text), convention)
    if answer is None or not (answer := _bare(answer)):
        return Part("unparsed")
    return compared(answer, equal(gold, answer))


def equal(gold: str, answer: str) -> bool:
    """Whether an answer says the same as the gold one."""
    if plain_text(answer) and plain_text(gold) == plain_text(answer) and answer.count("!") == gold.count("!"):
        return True
    number = one_number(gold)
    if number is not None and not _CALCULATES.search(gold):
        given = one_number(answer)
        if given is not None and (given == number or ("%" in gold) == ("%" in answer)):
            return given == number  # 50% is 50 where percents are asked for, and may be 0.5
        fraction = ("." in number or "%" in gold) and _FRACTION.fullmatch(answer)
        if _CALCULATES.search(answer) and not fraction:
            return False
    if _WORDS.search(_NAMES.sub("", gold)):
        return False  # a word is no product of its letters
    wanted, found = _parsed(gold), _parsed(answer)
    if wanted is None or found is None:
        return False
    from math_verify import verify as same

    return bool(same(wanted, found, timeout_seconds=None))


def _read(text: str, convention: Convention) -> str | None:
    if convention == "tag":
        return extract(text, "tag", "text")
    if convention == "boxed":
        return extract(text, "boxed", "text")
    if "\\boxed" in text:
        return extract(text, "boxed", "text")
    line = text.rstrip().rpartition("\n")[2]
    start = 0
    for marker in _BEFORE.finditer(line):
        start = marker.end()
    clause = line[start:]
    formulas = [match[1] or match[2] for match in _IN_DOLLARS.finditer(clause)]
    if formulas:
        return formulas[0] if len(formulas) == 1 else None
    return clause


def _bare(text: str) -> str:
    """An answer without the marks around a formula, a variable before it, and a full stop."""
    text = text.strip().strip("*`").rstrip(".").strip()
    for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1:
            text = text[len(left) : len(text) - len(right)].strip()
    text = text.replace("−", "-").rstrip(".")
    return _VARIABLE.sub("", text).strip()


@functools.lru_cache(4096)
def _parsed(text: str) -> list[Any] | None:
    """What math-verify makes of a formula; None for nothing, and for what would take it too long."""
    if (
        len(text) > _LONGEST
        or "**" in text
        or "//" in text
        or _TOWER.search(text)
        or text.count("{") + text.count("(") > _DEEPEST
    ):
        return None
    if one_number(text) is None and _WORDS.search(_NAMES.sub("", text)):
        return [text]  # words are compared as text
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that it has no time limit: the pool has one
    read = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    return list(read) or None
