"""`exact`: the answer's text, without outer punctuation and the amount of white space."""

from __future__ import annotations

from farthing.recipe.rewards import Exact
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared, said


def verify(item: Item, text: str, convention: Convention, settings: Exact) -> Part:
    gold = plain_text(item.answer, settings.case)
    if not gold:
        return Part("bad_gold")
    found = extract(said(item, text), convention, "text")
    answer = plain_text(found, settings.case) if found is not None else None
    return compared(answer or None, answer == gold)
