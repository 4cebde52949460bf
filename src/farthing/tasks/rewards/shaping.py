"""Parts that look at the lengths of a group's answers: `length` and `overlong`."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.recipe.rewards import Overlong, is_own
from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.part import Part
from farthing.tasks.rewards.total import added, named, settings

# Answers that ran out of tokens too. A reward model's scores have no 0 that would be worth less than any of them.
_PAY_ANYHOW = ("format", "length", "overlong", "reward_model")
_CACHE = 5  # max_new_tokens over this: DAPO's 4,096 of 20,480


def shaped(
    item: Item, verdicts: Sequence[Verdict], lengths: Sequence[int], cut: Sequence[bool], longest: int
) -> list[Verdict]:
    """The verdicts on the answers to one question with the parts that lengths decide.

    Args:
        lengths: of the answers, in tokens.
        cut: whether each ran out of tokens; a verifier then pays nothing, whatever it says.
        longest: the most tokens that an answer may have.
    """
    if item.metadata["scorer"] != "rewards":
        return list(verdicts)
    rewards = named(item.metadata["rewards"])
    found: list[dict[str, Part]] = [{} for _ in verdicts]
    for parts, verdict, ended in zip(found, verdicts, cut, strict=True):
        if ended:
            unpaid = [
                n for n in verdict.parts if not (is_own(use := rewards[n]["use"]) or use in _PAY_ANYHOW)
            ]
            parts.update(dict.fromkeys(unpaid, Part("unparsed")))
    for name, part in rewards.items():
        if part["use"] == "length":
            pairs = zip(verdicts, cut, strict=True)
            scores = length([v.outcome == "right" and not ended for v, ended in pairs], lengths)
        elif part["use"] == "overlong":
            chosen: Overlong = settings(part)
            scores = [overlong(tokens, longest, chosen.cache) for tokens in lengths]
        else:
            continue
        for parts, score in zip(found, scores, strict=True):
            parts[name] = Part("right" if score >= 0 else "wrong", reward=score)
    return [added(item, v, parts) if parts else v for v, parts in zip(verdicts, found, strict=True)]


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
