"""`regex`: a pattern of the recipe. One that takes for ever is cut off by the pool's limit, as a timeout."""

from __future__ import annotations

import re

from farthing.recipe.rewards import Regex
from farthing.tasks.extract import without_echo
from farthing.tasks.item import Convention, Item
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import Part, compared


def verify(item: Item, text: str, convention: Convention, settings: Regex) -> Part:
    text = without_echo(text, item.question)
    pattern = re.compile(settings.pattern)
    if not pattern.groups:
        return Part("right", reward=1.0) if pattern.search(text) else Part("wrong")
    gold = plain_text(item.answer)
    if not gold:
        return Part("bad_gold")
    caught = [match[1] for match in pattern.finditer(text) if match[1] is not None]
    answer = plain_text(caught[-1]) if caught else None
    return compared(answer, answer == gold)
