"""Intervals of shares and of differences between shares, and an exact test; `studies/intervals.py` measures how often
the intervals hold the truth.

Each question counts once, with a value from 0 to 1: right or not, or a mean over several samples of an answer. Samples
of one question resemble each other, so the questions are what is independent, and they decide the widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb, inf, sqrt
from typing import Literal

Z95 = 1.959963984540054  # the normal distribution's 97.5% point
MATTERS = 0.05  # a difference of so many shares is one that people act on

Finding = Literal["rose", "fell", "no clear change", "too few to tell"]


def wilson(right: float, n: float) -> tuple[float, float]:
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


def mean(values: Sequence[float], samples: int = 1) -> tuple[float, float, float]:
    """(mean, its 95% interval) of one value from 0 to 1 for each question.

    Wilson's interval of as many plain questions as would vary as much (Dean and Pagano, Journal of Survey Statistics
    and Methodology 3, 2015); of values that are all 0 or 1 it is Wilson's own.

    Args:
        samples: of each question; so many times the questions are the most that they can be worth.

    Raises:
        ValueError: when there are none, or one is not from 0 to 1.
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError("the values are not one share or more")
    n, share = len(values), sum(values) / len(values)
    worth = _worth(n, share * (1 - share), values, samples)
    low, high = wilson(min(share, 1.0) * worth, worth)
    return share, low, high


def paired_difference(
    before: Sequence[float], after: Sequence[float], samples: int = 1
) -> tuple[float, float, float]:
    """(difference, its 95% interval) of the mean values of two models on the same questions.

    The score interval of paired proportions (Tango, Statistics in Medicine 17, 1998): it has a width where nothing or
    everything changed. Values between 0 and 1 count as the questions, changed up or down, that would vary as much.

    Args:
        samples: as of `mean`.

    Raises:
        ValueError: when the two are not as long as each other, or empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} answers are not pairs")
    changes = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    n = len(changes)
    up, down = sum(c for c in changes if c > 0) / n, -sum(c for c in changes if c < 0) / n
    worth = _worth(n, up + down - (up - down) ** 2, changes, samples)
    return (up - down, *tango(up * worth, down * worth, worth))


def _worth(n: int, spread: float, values: Sequence[float], samples: int) -> float:
    """The number of questions, each all or nothing with this variance, whose mean varies as these values' does.

    Fewer than that where few questions tell how much they vary, by Student's t (Korn and Graubard, Survey Methodology
    24, 1998); never fewer than there are, nor more than their samples.
    """
    if samples == 1 or n < 2 or spread < 1e-12:
        return float(n)
    middle = sum(values) / n
    variance = sum((value - middle) ** 2 for value in values) / (n - 1)
    if variance * samples < spread:
        return float(n * samples)
    return min(float(n * samples), max(float(n), n * spread / variance * (Z95 / _student(n - 1)) ** 2))


def _student(freedom: int) -> float:
    """The 97.5% point of Student's t, by its expansion around the normal one (Fisher and Cornish 1960; Abramowitz and
    Stegun, 26.7.5); 3% low for 2 degrees of freedom, exact to a thousandth from 5 on."""
    z = Z95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def tango(up: float, down: float, n: float) -> tuple[float, float]:
    """95% score interval of the difference, where of n pairs so many changed up and so many down (Tango 1998)."""

    def score(difference: float) -> float:
        """Standard errors, at this difference, by which what was seen lies above it."""
        half = (up + down - (2 * n - up + down) * difference) / 2
        fitted = (sqrt(half * half + 2 * n * down * difference * (1 - difference)) + half) / (2 * n)
        variance = n * (2 * fitted + difference * (1 - difference))
        distance = up - down - n * difference
        return distance / sqrt(variance) if variance > 0 else inf if distance > 0 else -inf

    seen = (up - down) / n
    low = _root(lambda value: score(value) - Z95, -1.0, seen)
    return low, _root(lambda value: score(value) + Z95, seen, 1.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def finding(low: float, high: float) -> Finding:
    """What the interval of a difference says: "too few to tell" where it holds both a gain and a loss that would
    matter."""
    if low > 0:
        return "rose"
    if high < 0:
        return "fell"
    return "too few to tell" if low <= -MATTERS and high >= MATTERS else "no clear change"


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p-value that fixes and breaks are equally likely (McNemar 1947, binomial form)."""
    fixed = sum(a and not b for b, a in zip(before, after, strict=True))
    broken = sum(b and not a for b, a in zip(before, after, strict=True))
    changed = fixed + broken
    tail = sum(comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**changed)
