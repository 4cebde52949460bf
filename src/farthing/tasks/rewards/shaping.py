"""Parts that look at the lengths of a group's answers: `length` and `overlong`."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.recipe.rewards import Overlong
from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.part import Part
from farthing.tasks.rewards.total import added, named, settings

_CACHE = 5  # max_new_tokens over this: DAPO's 4,096 of 20,480


def shaped(item: Item, verdicts: Sequence[Verdict], lengths: Sequence[int], longest: int) -> list[Verdict]:
    """The verdicts on the answers to one question with the parts that lengths decide.

    Args:
        lengths: of the answers, in tokens.
        longest: the most that an answer may have.
    """
    if item.metadata["scorer"] != "rewards":
        return list(verdicts)
    found: list[dict[str, Part]] = [{} for _ in verdicts]
    for name, part in named(item.metadata["rewards"]).items():
        if part["use"] == "length":
            rewards = length([verdict.outcome == "right" for verdict in verdicts], lengths)
        elif part["use"] == "overlong":
            chosen: Overlong = settings(part)
            rewards = [overlong(tokens, longest, chosen.cache) for tokens in lengths]
        else:
            continue
        for parts, reward in zip(found, rewards, strict=True):
            parts[name] = Part("right" if reward >= 0 else "wrong", reward=reward)
    return [
        added(item, verdict, parts) if parts else verdict
        for verdict, parts in zip(verdicts, found, strict=True)
    ]


def length(right: Sequence[bool], lengths: Sequence[int]) -> list[float]:
    """Kimi k1.5's length reward (arXiv:2501.12599, section 2.3.3): within a group, from 0.5 for the shortest answer to
    -0.5 for the longest; one that is not right gains nothing by being short."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    slopes = [0.5 - (tokens - shortest) / (longest - shortest) for tokens in lengths]
    return [slope if fine else min(0.0, slope) for fine, slope in zip(right, slopes, strict=True)]


def overlong(tokens: int, longest: int, cache: int | None = None) -> float:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to `cache` tokens before the longest answer, then down to
    -1 at its end."""
    cache = min(longest, cache or max(1, longest // _CACHE))
    return max(-1.0, min(0.0, (longest - cache - tokens) / cache))
