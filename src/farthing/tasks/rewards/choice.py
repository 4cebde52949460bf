"""`choice`: one of several choices, named by its letter or by its own text."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from farthing.recipe.rewards import Plain
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared, said

# "B", "(B)", "B.", "**B**", "option B", "\text{B}", each with the choice's text behind it or not
_LETTER = re.compile(
    r"(?:\\text(?:bf)?\{)?[\s*_`$\"'“]*(?:(?:option|choice|answer)\s+)?[(\[*_]*([A-Za-z])(?![A-Za-z0-9])[)\]}*_]*"
    r"[\s.:,)–-]*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_NAMES = re.compile(
    r"\b(?:answer|choice|option|choose|pick|select)[\s:*_`\"']*[(\[]?([A-Z])[)\]]?[\s.*_`\"'!]*$"
)
_DENIES = re.compile(r"\b(?:not|never|neither|nor|except|or)\b|n't\b", re.IGNORECASE)


def verify(item: Item, text: str, convention: Convention, settings: Plain) -> Part:
    choices = [str(choice) for choice in item.metadata.get("choices") or ()]
    gold = letter_of(item.answer, choices)
    if gold is None:
        return Part("bad_gold")
    answer = _read(said(item, text), convention, choices)
    return compared(answer, answer == gold)


def _read(text: str, convention: Convention, choices: Sequence[str]) -> str | None:
    found = extract(text, convention, "text")
    if convention != "final":
        return letter_of(found or "", choices)
    line = text.rstrip().rpartition("\n")[2]
    read = {letter_of(part, choices) for part in (found or "", line)}
    if not _DENIES.search(line) and (named := _NAMES.search(line)):
        read.add(letter_of(named[1], choices))
    letters = read - {None}
    return letters.pop() if len(letters) == 1 else None


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a short answer names; None for none, or more than one."""
    labels = string.ascii_uppercase[: len(choices) or 26]
    if (match := _LETTER.fullmatch(answer.strip())) and match[1].upper() in labels:
        letter, rest = match[1].upper(), plain_text(match[2]).strip("}* ")
        own = plain_text(choices[labels.index(letter)]) if choices else ""
        if not rest or rest == own:
            return letter
    texts = [plain_text(choice) for choice in choices]
    return labels[texts.index(plain_text(answer))] if texts.count(plain_text(answer)) == 1 else None
