"""`number`: the answer is a number, in any of its spellings (GSM8K)."""

from __future__ import annotations

from farthing.recipe.rewards import Number
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.numbers import one_number
from farthing.tasks.rewards.part import Part, compared, said

_GSM8K = "####"  # before the answer of a worked solution


def verify(item: Item, text: str, convention: Convention, settings: Number) -> Part:
    gold = number_of(item.answer, settings.after)
    if gold is None:
        return Part("bad_gold")
    if settings.after is not None:
        answer = number_of(text, settings.after) if settings.after in text else None
    else:
        found = extract(said(item, text), convention)
        answer = None if found is None else one_number(found)
    return compared(answer, answer == gold)


def number_of(answer: str, after: str | None = None) -> str | None:
    """The number of a gold answer: all there is, or what follows the last marker of a worked solution."""
    for marker in filter(None, (after, _GSM8K)):
        if marker in answer:
            return one_number(answer.rpartition(marker)[2])
    return one_number(answer)
