"""How often does a 95% interval of a paired difference, or of a mean over samples, hold the truth?

Draws evaluations with a known truth, over numbers of questions, shares that change, and how one-sided the changes are,
and counts. The tables in docs/evaluation.md are what this prints; it takes about two minutes:

    python studies/intervals.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import sqrt
from typing import Annotated

import numpy as np
import typer

from farthing.evaluate.intervals import Z95, mean, paired_difference, tango, wilson

SIZES = (10, 20, 50, 100, 200, 500, 1000)
CHANGED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
ONE_SIDED = (0.5, 0.75, 1.0)  # share of the changed questions that change up
STILL_RIGHT = 0.3  # share of the unchanged questions that are right
SAMPLES = (4, 16)
SHAPES = {
    "easy or hard": (0.3, 0.3),
    "middling": (3.0, 3.0),
    "mostly wrong": (0.2, 2.0),
}  # of beta distributions

Counts = tuple[int, int, int, int]  # changed up, changed down, right both times, wrong both times
Bounds = tuple[float, float]


# ---- the methods ----


def bootstrap(counts: Counts) -> Bounds:
    """Percentiles of resampled questions (Efron 1979), as earlier versions used."""
    up, down, right, wrong = counts
    n = sum(counts)
    draws = np.random.default_rng(0).multinomial(n, [up / n, down / n, (right + wrong) / n], size=1000)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return float(low), float(high)


def _wald(up: float, down: float, n: float) -> Bounds:
    difference = (up - down) / n
    half = Z95 * sqrt(max(0.0, (up + down) / n - difference**2) / n)
    return max(-1.0, difference - half), min(1.0, difference + half)


def wald(counts: Counts) -> Bounds:
    """The difference and 1.96 standard errors."""
    return _wald(counts[0], counts[1], sum(counts))


def agresti_min(counts: Counts) -> Bounds:
    """The same with half a pair added to each of the four counts (Statistics in Medicine 24, 2005)."""
    return _wald(counts[0] + 0.5, counts[1] + 0.5, sum(counts) + 2)


def bonett_price(counts: Counts) -> Bounds:
    """The same with a pair added that changed up and one that changed down (Journal of Educational and Behavioral
    Statistics 37, 2012)."""
    return _wald(counts[0] + 1, counts[1] + 1, sum(counts) + 2)


def newcombe(counts: Counts) -> Bounds:
    """Two Wilson intervals, squared and added (method 10 of Newcombe, Statistics in Medicine 17, 1998)."""
    up, down, right, wrong = counts
    n = sum(counts)
    after, before = (right + up) / n, (right + down) / n
    (low_a, high_a), (low_b, high_b) = wilson(right + up, n), wilson(right + down, n)
    margins = (right + up) * (down + wrong) * (right + down) * (up + wrong)
    alike = float(right * wrong - up * down)
    alike = max(alike - n / 2, 0.0) if alike > 0 else alike
    phi = alike / sqrt(margins) if margins else 0.0

    def half(one: float, other: float) -> float:
        return sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = after - before
    return difference - half(after - low_a, high_b - before), difference + half(
        high_a - after, before - low_b
    )


def conditional(counts: Counts) -> Bounds:
    """Clopper and Pearson's exact interval (1934) of the changed questions' share that changed up, times the share
    that changed, as if that were known."""
    up, down = counts[:2]
    changed, n = up + down, sum(counts)
    if not changed:
        return 0.0, 0.0
    low, high = _clopper_pearson(up, changed)
    return (2 * low - 1) * changed / n, (2 * high - 1) * changed / n


@cache
def _clopper_pearson(right: int, n: int) -> Bounds:
    def solve(reached: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return (low + high) / 2

    low = 0.0 if right == 0 else solve(lambda p: 1 - _at_most(right - 1, n, p) >= 0.025)
    high = 1.0 if right == n else solve(lambda p: _at_most(right, n, p) <= 0.025)
    return low, high


def _at_most(most: int, n: int, p: float) -> float:
    """The probability of at most so many of n."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0 or most >= n else 0.0
    k = np.arange(most + 1)
    logs = np.cumsum(np.log([1.0, *((n - k[1:] + 1) / k[1:])]))
    return float(np.exp(logs + k * np.log(p) + (n - k) * np.log1p(-p)).sum())


def ours(counts: Counts) -> Bounds:
    """Tango's score interval, as in `farthing.evaluate.intervals`."""
    return tango(counts[0], counts[1], sum(counts))


METHODS: Mapping[str, Callable[[Counts], Bounds]] = {
    "bootstrap": bootstrap, "Wald": wald, "exact, conditional": conditional, "Agresti-Min": agresti_min,
    "Bonett-Price": bonett_price, "Newcombe 10": newcombe, "Tango": ours,
}  # fmt: skip


# ---- coverage ----


def coverage(method: Callable[[Counts], Bounds], truth: float, drawn: Mapping[Counts, int]) -> Bounds:
    """Share of the drawn evaluations whose interval holds the truth, and the intervals' mean width."""
    held = width = 0.0
    for counts, times in drawn.items():
        low, high = method(counts)
        held += times * (low - 1e-9 <= truth <= high + 1e-9)
        width += times * (high - low)
    total = sum(drawn.values())
    return held / total, width / total


def evaluations(n: int, changed: float, up: float, draws: int, seed: int) -> dict[Counts, int]:
    """So many drawn evaluations of n questions, equal ones counted together."""
    still = 1 - changed
    shares = [changed * up, changed * (1 - up), still * STILL_RIGHT, still * (1 - STILL_RIGHT)]
    rows, times = np.unique(
        np.random.default_rng(seed).multinomial(n, shares, size=draws), axis=0, return_counts=True
    )
    return {(a, b, c, d): t for (a, b, c, d), t in zip(rows.tolist(), times.tolist(), strict=True)}


def paired_table(draws: int, sizes: Sequence[int] = SIZES) -> list[dict[str, object]]:
    """For every size: each method's lowest, mean and highest coverage over the settings, and its mean width."""
    rows: list[dict[str, object]] = []
    for n in sizes:
        found: dict[str, list[Bounds]] = {name: [] for name in METHODS}
        for changed in CHANGED:
            for up in ONE_SIDED:
                drawn = evaluations(n, changed, up, draws, seed=n)
                for name, method in METHODS.items():
                    found[name].append(coverage(cache(method), changed * (2 * up - 1), drawn))
        for name, cells in found.items():
            shares, widths = zip(*cells, strict=True)
            rows.append({
                "n": n, "method": name, "lowest": min(shares), "mean": sum(shares) / len(shares),
                "highest": max(shares), "width": sum(widths) / len(widths),
            })  # fmt: skip
    return rows


def sampled_table(draws: int, sizes: Sequence[int] = SIZES) -> list[dict[str, object]]:
    """The same for means over samples, each question with a chance of its own, and for their paired difference, where
    training moves every chance a tenth of the way to 1."""
    rows: list[dict[str, object]] = []
    for n in sizes:
        for samples in SAMPLES:
            for shape, (a, b) in SHAPES.items():
                draw = np.random.default_rng(n)
                of_mean, of_difference, widths = 0, 0, 0.0
                share = a / (a + b)
                for _ in range(draws):
                    chance = draw.beta(a, b, size=n)
                    before = (draw.binomial(samples, chance) / samples).tolist()
                    after = (draw.binomial(samples, chance + 0.1 * (1 - chance)) / samples).tolist()
                    _, low, high = mean(before, samples)
                    of_mean += low <= share <= high
                    _, low, high = paired_difference(before, after, samples)
                    of_difference += low <= 0.1 * (1 - share) <= high
                    widths += high - low
                rows.append({
                    "n": n, "samples": samples, "questions": shape, "mean": of_mean / draws,
                    "difference": of_difference / draws, "width": widths / draws,
                })  # fmt: skip
    return rows


# ---- printing ----


def _paired_text(rows: Sequence[Mapping[str, object]]) -> str:
    lines = ["| questions | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for n in dict.fromkeys(row["n"] for row in rows):
        cells = [f"{row['lowest']:.0%} / {row['mean']:.1%}" for row in rows if row["n"] == n]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sampled_text(rows: Sequence[Mapping[str, object]]) -> str:
    lines = ["| questions | samples | chances | mean | paired difference |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['n']} | {row['samples']} | {row['questions']} | {row['mean']:.1%} | {row['difference']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    draws: Annotated[int, typer.Option(min=1, help="Evaluations drawn for each setting.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the coverage of 95% intervals: of paired differences, lowest and mean over the settings, and of means."""
    paired, sampled = paired_table(draws), sampled_table(min(draws, 500))
    if as_json:
        typer.echo(json.dumps({"paired": paired, "sampled": sampled}))
    else:
        typer.echo(f"{_paired_text(paired)}\n\n{_sampled_text(sampled)}")


if __name__ == "__main__":
    typer.run(main)
