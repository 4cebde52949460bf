"""`reward_model`: the score that a sequence classifier gives the question with the answer.

It is the classifier's own number: of any sign and size, and comparable only between answers to the same question. An
answer that ran out of tokens is scored as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from farthing.cost.meter import Span
from farthing.recipe.rewards import RewardModel
from farthing.tasks.item import Item
from farthing.tasks.rewards.models import Models
from farthing.tasks.rewards.part import Part


def parts(settings: RewardModel, pairs: Sequence[tuple[Item, str]], models: Models, span: Span) -> list[Part]:
    """The parts of the verdicts on completions."""
    return [_part(score, settings) for score in models.scores(settings.model, pairs, span)]


def _part(score: float | str, settings: RewardModel) -> Part:
    if isinstance(score, str):
        return Part("error", error=f"reward_model: {score}")
    if not math.isfinite(score):
        return Part("error", error=f"reward_model: its score is {score}, no finite number")
    return Part("right" if score >= settings.right_from else "wrong", f"{score:.4g}", score)
