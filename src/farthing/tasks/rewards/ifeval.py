"""`ifeval`: the answer follows every instruction of its row (IFEval's strict accuracy of prompts, arXiv:2311.07911)."""

from __future__ import annotations

from farthing.recipe.rewards import Plain
from farthing.tasks.instructions import follows, unchecked
from farthing.tasks.item import Convention, Item
from farthing.tasks.rewards.part import Part


def verify(item: Item, text: str, convention: Convention, settings: Plain) -> Part:
    row = item.metadata["row"]
    if unchecked(row):
        return Part("bad_gold")
    _, closed, answer = text.rpartition("</think>")
    answer = answer if closed else text
    if not answer.strip():
        return Part("unparsed")
    listed = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    broken = [name for name, given in listed if not follows(answer, name, given)]
    return Part("wrong", f"not {', '.join(broken)}") if broken else Part("right", answer[:100], 1.0)
