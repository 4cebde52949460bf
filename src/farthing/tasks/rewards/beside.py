"""Parts that this process finds, beside the verifier processes: `judge` and `reward_model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.judge import Judges
from farthing.tasks.rewards.part import Part
from farthing.tasks.rewards.total import added, named, settings

Score = Callable[[Any, Sequence[tuple[Item, str]]], list[Part]]
"""A part's settings, and completions of items, to the parts of their verdicts."""


def completed(
    pairs: Sequence[tuple[Item, str]], verdicts: list[Verdict], judges: Judges, models: Mapping[str, Score]
) -> list[Verdict]:
    """The verdicts with the parts that models find.

    Args:
        models: how a model of a folder is asked, by the part that wants it: judge, reward_model.

    Raises:
        UserError: when a judge's budget is spent, or a model cannot be loaded.
    """
    waiting: dict[tuple[str, str], list[int]] = {}  # by a part's name and settings
    for place, ((item, _), verdict) in enumerate(zip(pairs, verdicts, strict=True)):
        if verdict.outcome in ("error", "bad_gold", "timeout"):
            continue
        for name, part in named(item.metadata.get("rewards", ())).items():
            if part["use"] in ("judge", "reward_model"):
                waiting.setdefault((name, repr(part)), []).append(place)
    for (name, _), places in waiting.items():
        part = named(pairs[places[0]][0].metadata["rewards"])[name]
        chosen = settings(part)
        score = judges.parts if getattr(chosen, "url", None) else models.get(part["use"], _nothing)
        found = score(chosen, [pairs[place] for place in places])
        for place, one in zip(places, found, strict=True):
            verdicts[place] = added(pairs[place][0], verdicts[place], {name: one})
    return verdicts


def _nothing(chosen: Any, pairs: Sequence[tuple[Item, str]]) -> list[Part]:
    return [Part("error", error=f"{chosen.path}: no model is loaded here to judge with") for _ in pairs]
