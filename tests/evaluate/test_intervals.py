"""Intervals and tests against known values, and by how often they hold the truth."""

from math import comb, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.evaluate.intervals import finding, mcnemar, mean, paired_difference, tango, wilson

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


# ---- means over samples ----


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 4))
def test_of_one_answer_each_a_mean_has_wilsons_interval(right: list[bool], samples: int) -> None:
    share, low, high = mean([float(r) for r in right], 1)
    assert share == pytest.approx(sum(right) / len(right))
    assert (low, high) == pytest.approx(wilson(sum(right), len(right)))
    # answered several times, always alike, the questions are worth no more (but for n - 1 in their variance)
    _, low, high = mean([float(r) for r in right], samples)
    assert (low, high) == pytest.approx(wilson(sum(right), len(right)))


def test_samples_narrow_the_interval_by_what_they_are_worth() -> None:
    draw = np.random.default_rng(0)
    same_chance = (draw.binomial(16, 0.4, size=200) / 16).tolist()  # each sample is as good as a question
    _, low, high = mean(same_chance, 16)
    assert high - low == pytest.approx(2 * 1.96 * sqrt(0.4 * 0.6 / 3200), rel=0.2)
    assert mean([0.5] * 10, 2)[1:] == pytest.approx(wilson(10, 20))  # no spread at all: their number, at most


@pytest.mark.parametrize("values", [[], [1.5], [-0.1]])
def test_a_mean_is_of_shares(values: list[float]) -> None:
    with pytest.raises(ValueError, match="share"):
        mean(values)


# ---- paired differences ----


def test_the_paired_interval_is_the_published_one() -> None:
    # airway hyper-responsiveness before and after stem cell transplantation, 1 changed up and 7 down of 21: Fagerland,
    # Lydersen and Laake, Statistics in Medicine 33 (2014), table IV, Tango's
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=6e-4)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=50)
def test_the_paired_interval_solves_the_score_equation(unchanged: int, up: int, down: int) -> None:
    n = unchanged + up + down
    for bound in tango(up, down, n):
        if abs(bound) > 0.999:
            continue
        # the likeliest share that changes down, if the shares' difference is this bound, by trying all of them
        shares = np.linspace(max(0.0, -bound), (1 - bound) / 2, 20_001)[1:-1]
        likely = down * np.log(shares) + unchanged * np.log(1 - 2 * shares - bound)
        if up:
            likely = likely + up * np.log(shares + bound)
        share = shares[likely.argmax()]
        error = sqrt((2 * share + bound - bound**2) / n)
        assert abs((up - down) / n - bound) == pytest.approx(1.96 * error, rel=0.01)


def test_nothing_or_everything_changed_still_has_a_width() -> None:
    assert tango(0, 0, 20) == pytest.approx((-0.161, 0.161), abs=1e-3)
    assert tango(20, 0, 20) == pytest.approx((0.678, 1.0), abs=1e-3)
    assert tango(0, 20, 20) == pytest.approx((-1.0, -0.678), abs=1e-3)


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("changed", [0.02, 0.1, 0.4])
def test_the_paired_interval_holds_the_truth(n: int, changed: float) -> None:
    """Exactly: by the chance of every outcome in which so many questions change."""
    up_share, down_share = 0.75 * changed, 0.25 * changed
    held = 0.0
    for up in range(n + 1):
        for down in range(n + 1 - up):
            log_chance = (
                log(comb(n, up))
                + log(comb(n - up, down))
                + up * log(up_share)
                + down * log(down_share)
                + (n - up - down) * log(1 - changed)
            )
            if log_chance > -14:
                low, high = tango(up, down, n)
                held += np.exp(log_chance) * (low <= up_share - down_share <= high)
    assert held >= 0.93


@given(answers)
def test_the_paired_interval_is_antisymmetric(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    difference, low, high = paired_difference(before, after)
    assert difference == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert -1 <= low <= difference <= high <= 1
    assert paired_difference(after, before) == pytest.approx((-difference, -high, -low), abs=1e-9)
    nothing, low, high = paired_difference(before, before)
    assert nothing == 0
    assert low < 0 < high


def test_pairing_narrows_the_interval() -> None:
    before = [True, False] * 100
    after = [True, False] * 95 + [True, True] * 5  # the same answers but five
    _, low, high = paired_difference(before, after)
    assert high - low < 0.06
    shuffled = [False] * 95 + [True] * 105  # as many right, on other questions
    _, low, high = paired_difference(before, shuffled)
    assert high - low > 0.15


def test_the_paired_interval_of_samples_holds_the_truth() -> None:
    draw = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        chance = draw.beta(0.5, 0.5, size=60)
        before = (draw.binomial(8, chance) / 8).tolist()
        after = (draw.binomial(8, 0.8 * chance + 0.2) / 8).tolist()
        _, low, high = paired_difference(before, after, 8)
        held += low <= 0.1 <= high
    assert 0.92 <= held / 300 <= 0.99


def test_pairs_must_be_pairs() -> None:
    for before, after in (([True], []), ([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="are not pairs"):
            paired_difference(before, after)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "rose"),
        (-0.2, -0.01, "fell"),
        (-0.004, 0.004, "no clear change"),  # nothing of 1,000 changed
        (-0.02, 0.3, "no clear change"),
        (-0.16, 0.16, "too few to tell"),  # nothing of 20 changed
    ],
)
def test_an_interval_is_put_in_words(low: float, high: float, said: str) -> None:
    assert finding(low, high) == said


# ---- the exact test ----


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
