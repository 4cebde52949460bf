"""Rewards of several parts: each is found apart, and they add up by their weights.

The first part that is not shaping says whether the answer is right; where all are shaping, the first. A part without an
opinion is left out. An answer whose reward failed, or whose gold answer is broken, has no parts and no score.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from farthing.recipe import RewardPart
from farthing.recipe.rewards import SHAPING, is_own, settings_of
from farthing.tasks.item import Convention, Item, Verdict
from farthing.tasks.rewards.part import Part

AFTERWARDS = ("judge", "reward_model", "length", "overlong")
"""Parts that no verifier process can find: they need a model, the network, or more than an answer's text."""


def judged(item: Item, text: str, convention: Convention) -> Verdict:
    """The verdict on a completion by those of the item's rewards that its text alone decides."""
    found = {
        name: module(part["use"]).verify(item, text, convention, settings(part))
        for name, part in named(item.metadata["rewards"]).items()
        if part["use"] not in AFTERWARDS
    }
    return added(item, Verdict("unparsed"), found)


def added(item: Item, verdict: Verdict, found: Mapping[str, Part]) -> Verdict:
    """`verdict` with further parts by name, and the total of all of them as its score."""
    if verdict.outcome in ("error", "bad_gold", "timeout"):
        return verdict
    for part in found.values():
        if part.outcome in ("error", "bad_gold"):
            return Verdict(part.outcome, error=part.error)
    rewards = named(item.metadata["rewards"])
    parts = {**verdict.parts, **{name: p.reward for name, p in found.items() if p.reward is not None}}
    score = sum(part["weight"] * parts[name] for name, part in rewards.items() if name in parts)
    deciding = found.get(decides(rewards))
    outcome, answer = (deciding.outcome, deciding.answer) if deciding else (verdict.outcome, verdict.answer)
    return Verdict(outcome, answer, score, parts)


def decides(rewards: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of the part that says whether an answer is right."""
    return next((name for name, part in rewards.items() if part["use"] not in SHAPING), next(iter(rewards)))


def named(rewards: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The parts by the names they are logged under: the verifier's or the function's, numbered where it comes twice."""
    parts: dict[str, Mapping[str, Any]] = {}
    for part in rewards:
        name = part["use"].rpartition(":")[2] if is_own(part["use"]) else part["use"]
        number = sum(known.partition(" ")[0] == name for known in parts) + 1
        parts[name if number == 1 else f"{name} {number}"] = part
    return parts


def settings(part: Mapping[str, Any]) -> Any:
    """The part's settings with their defaults, and where they belong to one's own function, its `use`."""
    return _settings(part["use"], json.dumps(part.get("settings") or {}))


@functools.cache
def _settings(use: str, written: str) -> Any:
    return settings_of(RewardPart(use=use, settings=json.loads(written)))


def module(use: str) -> Any:
    """The module of a verifier."""
    return importlib.import_module(f"farthing.tasks.rewards.{'own' if is_own(use) else use}")
