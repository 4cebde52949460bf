"""`format`: <think>…</think> and then <answer>…</answer>, nothing else (DeepSeek-R1, arXiv:2501.12948 section 2.2.2).

Stricter than the pattern that open-r1 made of it, which pays empty and nested tags: each tag once, in this order, with
something in both, and only white space before, between and behind them.
"""

from __future__ import annotations

import re

from farthing.recipe.rewards import Plain
from farthing.tasks.item import Convention, Item
from farthing.tasks.rewards.part import Part

_TAG = re.compile(r"</?(?:think|answer)>")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def verify(item: Item, text: str, convention: Convention, settings: Plain) -> Part:
    tags = _TAG.findall(text)
    before, thought, between, answer, after = _TAG.split(text) if tags == _ORDER else ("x", "", "", "", "")
    held = thought.strip() and answer.strip() and not (before + between + after).strip()
    return Part("right", reward=1.0) if held else Part("wrong")
