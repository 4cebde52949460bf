"""`exact`: the answer's text, without outer punctuation and the amount of white space."""

from __future__ import annotations

from farthing.recipe.rewards import Exact
from farthing.tasks.extract import extract, plain_form
from farthing.tasks.item import Convention, Item
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared, said


def verify(item: Item, text: str, convention: Convention, settings: Exact) -> Part:
    gold = plain_text(item.answer, settings.case)
    plain = _read(plain_form(item.answer, convention), convention, settings.case)
    if (
        not gold or plain != gold
    ):  # nothing, or what the convention cannot say, as "final" a line with a colon in it
        return Part("bad_gold")
    answer = _read(said(item, text), convention, settings.case)
    return compared(answer, answer == gold)


def _read(text: str, convention: Convention, case: bool) -> str | None:
    found = extract(text, convention, "text")
    return plain_text(found, case) or None if found is not None else None
