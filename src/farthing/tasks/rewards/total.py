"""Rewards of several parts: each is found apart, and they add up by their weights.

The first part that is not shaping says whether the answer is right; where all are shaping, the first. A part without an
opinion is left out. An answer whose reward failed, or whose gold answer is broken, has no parts and no score.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from farthing.recipe import RewardPart
from farthing.recipe.rewards import ASKED, SHAPING, Code, Own, is_own, settings_of
from farthing.tasks.item import Convention, Item, Verdict
from farthing.tasks.rewards import own
from farthing.tasks.rewards.part import Part

CLOCK = (
    2.0  # seconds by the clock for each second of processor time that a reward may take: machines are shared
)

AFTERWARDS = (*ASKED, "length", "overlong")
"""Parts that no verifier process can find: they need the network, a model, or more than an answer's text."""


def judged(item: Item, text: str, convention: Convention) -> Verdict:
    """The verdict on a completion by those of the item's rewards that its text alone decides."""
    found = {
        name: _found(part, item, text, convention)
        for name, part in named(item.metadata["rewards"]).items()
        if part["use"] not in AFTERWARDS
    }
    return added(item, Verdict("unparsed"), found)


def _found(part: Mapping[str, Any], item: Item, text: str, convention: Convention) -> Part:
    use = part["use"]
    if is_own(use):
        return own.verify(use, item, text, settings(part))
    found: Part = module(use).verify(item, text, convention, settings(part))
    return found


def prepare(items: Iterable[Item]) -> None:
    """Import what the items' rewards need, so that the time this takes is no answer's."""
    for use in {part["use"] for item in items for part in item.metadata.get("rewards", ())}:
        if is_own(use):
            own.prepare(use)
        elif use not in AFTERWARDS:
            module(use)


def own_files(items: Iterable[Item]) -> list[str]:
    """Names of the files of the user's own that the items' rewards are in."""
    uses = {part["use"] for item in items for part in item.metadata.get("rewards", ()) if is_own(part["use"])}
    return sorted({PurePath(use.rpartition(":")[0]).name for use in uses})


def patience(item: Item) -> float:
    """Seconds by the clock that an item's rewards may take beyond the pool's limit."""
    given = [settings(part) for part in item.metadata.get("rewards", ())]
    return sum(CLOCK * setting.seconds for setting in given if isinstance(setting, Code | Own))


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


def parts_of(item: Item) -> list[str]:
    """The names of an item's rewards; none for a generator's."""
    return list(named(item.metadata.get("rewards", ())))


def settings(part: Mapping[str, Any]) -> Any:
    """The part's settings with their defaults."""
    return _settings(part["use"], json.dumps(part.get("settings") or {}))


@functools.cache
def _settings(use: str, written: str) -> Any:
    return settings_of(RewardPart(use=use, settings=json.loads(written)))


def module(use: str) -> Any:
    """The module of a verifier."""
    return importlib.import_module(f"farthing.tasks.rewards.{use}")
