"""Outcomes, intervals and gains of evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np

from farthing.tasks.item import OUTCOMES, READABLE

Record = dict[str, Any]
"""A line of evaluations/*.jsonl: index, task, question, gold, text, outcome, answer, tokens."""


def summarise(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Counts of every outcome, the accuracy and its 95% Wilson interval, overall and by task."""
    summary = _counts(records)
    tasks = sorted({record["task"] for record in records})
    by_task = {task: _counts([r for r in records if r["task"] == task]) for task in tasks}
    return {"name": name, **summary, "by_task": by_task}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    counts = Counter(record["outcome"] for record in records)
    n = len(records)
    return {
        "n": n,
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "accuracy": counts["right"] / n,
        "ci95": list(wilson(counts["right"], n)),
        "mean_tokens": sum(record["tokens"] for record in records) / n,
    }


def gain(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """The change from one evaluation to another, question by question.

    `on_parseable` covers the questions where the first model already gave a readable answer: a gain there does not
    come from learning the format. `format` covers the rest: answers that are readable only now.

    Raises:
        ValueError: if the two are not answers to the same questions.
    """
    if [r["question"] for r in before] != [r["question"] for r in after]:
        raise ValueError("the two evaluations asked different questions")
    pairs = list(zip(before, after, strict=True))
    readable = [pair for pair in pairs if pair[0]["outcome"] in READABLE]
    unreadable = [pair for pair in pairs if pair[0]["outcome"] not in READABLE]
    out = _difference(pairs)
    out["mcnemar_p"] = mcnemar(*_right(pairs))
    out["on_parseable"] = {"n": len(readable), **(_difference(readable) if readable else {})}
    found = [after for _, after in unreadable if after["outcome"] in READABLE]
    out["format"] = {
        "n": len(unreadable),
        "now_parsed": len(found),
        "now_right": sum(record["outcome"] == "right" for record in found),
        "share_of_all": sum(record["outcome"] == "right" for record in found) / len(pairs),
    }
    return out


def _right(pairs: Sequence[tuple[Record, Record]]) -> tuple[list[bool], list[bool]]:
    before, after = ([pair[side]["outcome"] == "right" for pair in pairs] for side in (0, 1))
    return before, after


def _difference(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    difference, low, high = paired_difference(*_right(pairs))
    return {"difference": difference, "ci95": [low, high]}


Z95 = 1.959963984540054  # the normal distribution's 97.5% point


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927); unlike right/n +- 2 se it stays within 0 and 1.

    Raises:
        ValueError: when n is not positive or right is not within 0..n.
    """
    if not (n > 0 and 0 <= right <= n):
        raise ValueError(f"{right} right of {n} is no proportion")
    share, spread = right / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], draws: int = 10_000
) -> tuple[float, float, float]:
    """(difference in accuracy, its 95% interval) for two models on the same questions.

    The interval is the percentile bootstrap over questions (Efron 1979), its draws seeded, so that the same
    answers always give the same interval. Only (+1, 0, -1) per question matter, so a resample is a
    multinomial draw.

    Raises:
        ValueError: when the two are not as long as each other, or empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} answers are not pairs")
    change = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)
    n = len(change)
    shares = np.array([(change == value).mean() for value in (1, 0, -1)])
    counts = np.random.default_rng(0).multinomial(n, shares, size=draws)
    low, high = np.percentile((counts[:, 0] - counts[:, 2]) / n, [2.5, 97.5])
    return float(change.mean()), float(low), float(high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p-value that fixes and breaks are equally likely (McNemar 1947, binomial form)."""
    fixed = sum(a and not b for b, a in zip(before, after, strict=True))
    broken = sum(b and not a for b, a in zip(before, after, strict=True))
    changed = fixed + broken
    tail = sum(comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**changed)
