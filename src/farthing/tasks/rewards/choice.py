"""`choice`: one of several choices, named by its letter or by its own text."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence

from farthing.recipe.rewards import Plain
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared, said

# "B", "(B)", "B.", "**B**", "option B", "\text{B}", each with the choice's text behind it or not
_LETTER = re.compile(
    r"(?:\\(?:text(?:bf)?|math(?:rm|bf))\{)?[\s*_`$\"'“]*(?:(?:option|choice|answer)\s+)?[(\[*_]*([A-Za-z])(?![A-Za-z0-9])[)\]}*_]*"
    r"[\s.:,)–-]*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_NAMES = re.compile(
    r"\b(?:answer|choice|option|choose|pick|select)[\s:*_`\"']*[(\[]?([A-Z])[)\]]?[\s.*_`\"'!]*$"
)
_ENDS = re.compile(r"(?<=[.!?])\s+")  # of sentences
_DENIES = re.compile(r"\b(?:not|never|neither|nor|except|or)\b|n't\b", re.IGNORECASE)


def verify(item: Item, text: str, convention: Convention, settings: Plain) -> Part:
    choices = [str(choice) for choice in item.metadata.get("choices") or ()]
    gold = letter_of(item.answer, choices)
    if gold is None:
        return Part("bad_gold")
    answer = _read(said(item, text), convention, choices)
    return compared(answer, answer == gold)


def _read(text: str, convention: Convention, choices: Sequence[str]) -> str | None:
    if convention == "final" and "\\boxed" in text:
        convention = "boxed"
    if convention != "final":
        return letter_of(extract(text, convention, "text") or "", choices)
    *earlier, last = text.rstrip().split("\n")
    claims = dict(_claims(last, choices))
    if len(set(claims.values())) != 1:
        return None
    letter = next(iter(claims.values()))
    # of several options claimed in the same words, as in a list of all, none is the answer
    others = (
        claim for line in [*earlier, last] for part in _ENDS.split(line) for claim in _claims(part, choices)
    )
    return None if any(way in claims and named != letter for way, named in others) else letter


def _claims(line: str, choices: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The letters that a line names, each with the words before it."""
    found = [("", line)]
    if said := extract(line, "final", "text"):
        found.append((line[: line.rfind(said)], said))
    if not _DENIES.search(line) and (named := _NAMES.search(line)):
        found.append((line[: named.start(1)], named[1]))
    for way, part in found:
        if letter := letter_of(part, choices):
            yield plain_text(_ENDS.split(way)[-1]), letter


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
