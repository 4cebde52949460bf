"""Intervals and tests against known values, and by how often they hold the truth."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.evaluate.score import mcnemar, paired_difference, wilson

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(case: tuple[int, int]) -> None:
    right, n = case
    share = right / n
    low, high = wilson(right, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-12 < bound < 1 - 1e-12:  # |share - p| is 1.96 standard errors *at p*
            assert abs(share - bound) == pytest.approx(1.959963985 * sqrt(bound * (1 - bound) / n), abs=1e-7)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_what_is_no_proportion(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(right, n)


@pytest.mark.parametrize("shares", [(0.3, 0.15), (0.12, 0.1)], ids=["gain", "hardly any gain"])
def test_the_paired_interval_holds_the_truth_nineteen_times_in_twenty(shares: tuple[float, float]) -> None:
    fixed, broken = shares
    draw = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        kind = draw.choice(4, size=150, p=[fixed, broken, 0.3, 0.7 - fixed - broken])
        before = [bool(k in (1, 2)) for k in kind]
        after = [bool(k in (0, 2)) for k in kind]
        difference, low, high = paired_difference(before, after, draws=1000)
        assert low <= difference <= high
        held += low <= fixed - broken <= high
    assert 0.90 <= held / 300 <= 0.99


@given(answers)
def test_the_paired_interval_is_antisymmetric_and_repeatable(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    difference, low, high = paired_difference(before, after, draws=200)
    assert difference == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert -1 <= low <= high <= 1
    assert paired_difference(before, after, draws=200) == (difference, low, high)
    assert paired_difference(before, before, draws=200) == (0, 0, 0)
    assert paired_difference(after, before, draws=200)[0] == pytest.approx(-difference)


def test_pairing_narrows_the_interval() -> None:
    before = [True, False] * 100
    after = [True, False] * 95 + [True, True] * 5  # the same answers but five
    _, low, high = paired_difference(before, after)
    assert high - low < 0.06
    shuffled = [False] * 95 + [True] * 105  # as many right, on other questions
    _, low, high = paired_difference(before, shuffled)
    assert high - low > 0.15


def test_pairs_must_be_pairs() -> None:
    for before, after in (([True], []), ([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="are not pairs"):
            paired_difference(before, after)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),  # 2 / 2^5
        (0, 6, 0.03125),
        (8, 2, 0.109375),  # 2 (1 + 10 + 45) / 1024
        (2, 8, 0.109375),
        (7, 7, 1.0),
        (15, 5, 0.04138946533203125),  # 2 * 21700 / 2^20
    ],
)
def test_mcnemar_is_the_exact_binomial(fixed: int, broken: int, p: float) -> None:
    before = [False] * fixed + [True] * broken + [True] * 9 + [False] * 4
    after = [True] * fixed + [False] * broken + [True] * 9 + [False] * 4
    assert mcnemar(before, after) == pytest.approx(p, rel=1e-12)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])
