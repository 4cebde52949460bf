"""How sure a score is: intervals for one proportion and for the difference of two on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np

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
