"""Scores over several answers to a question: pass@1, pass@k, maj@k, and their paired difference."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.evaluate.intervals import mean, paired_difference
from farthing.evaluate.score import gain, majority, pass_at, summarise

GOLD = "7"


def answered(*questions: str) -> list[dict[str, Any]]:
    """A word for each question, a letter for each answer: a digit is read as said, c is cut off, u unparsed."""
    outcome = {"c": "cut_off", "u": "unparsed", GOLD: "right"}
    return [
        {
            "index": index, "sample": sample, "task": "t", "question": f"q{index}", "gold": GOLD, "tokens": 3,
            "outcome": outcome.get(letter, "wrong"), "answer": None if letter in "cu" else letter,
        }
        for index, word in enumerate(questions)
        for sample, letter in enumerate(word)
    ]  # fmt: skip


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(right: list[bool], k: int) -> None:
    k = min(k, len(right))
    draws = list(combinations(right, k))
    assert pass_at(k, len(right), sum(right)) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("letters", "worth"),
    [
        ("7", 1), ("3", 0), ("773", 1), ("337", 0), ("7737", 1),
        ("73", 1 / 2), ("7351", 1 / 4), ("7733u1", 1 / 2),
        ("7cccc", 1),  # what was not read does not vote
        ("cu", 0),
    ],
)  # fmt: skip
def test_the_majority_decides_and_a_tie_is_drawn(letters: str, worth: float) -> None:
    assert majority(answered(letters)) == worth


def test_several_answers_to_a_question_count_it_once() -> None:
    records = answered("7773", "3337", "7u7c", "1111")
    found = summarise("after", records)
    assert (found["n"], found["samples"]) == (4, 4)
    assert found["right"] == 6  # of 16 answers
    assert found["accuracy"] == pytest.approx(6 / 16)
    assert found["ci95"] == list(mean([3 / 4, 1 / 4, 2 / 4, 0], 4)[1:])
    assert list(found["pass_at"]) == ["2", "4"]
    assert found["pass_at"]["4"]["accuracy"] == 3 / 4
    assert found["pass_at"]["2"]["accuracy"] == pytest.approx((1 + 1 / 2 + 5 / 6 + 0) / 4)
    assert found["maj_at"] == {"4": {"accuracy": 1 / 2, "ci95": list(mean([1, 0, 1, 0], 4)[1:])}}
    assert found["by_task"]["t"]["pass_at"] == found["pass_at"]
    once = summarise("after", answered("7", "3"))
    assert "pass_at" not in once
    assert "samples" not in once


def test_the_gain_over_samples_is_by_question() -> None:
    before, after = answered("73", "33", "uu", "7u"), answered("77", "37", "77", "3u")
    found = gain(before, after)
    values = [1 / 2, 0, 0, 1 / 2], [1, 1 / 2, 1, 0]
    assert found["difference"] == pytest.approx(6 / 16)
    assert found["ci95"] == list(paired_difference(*values, 2)[1:])
    assert "mcnemar_p" not in found  # it is of one answer each
    assert found["on_parseable"]["n"] == 2
    whole = found["on_parseable"]["difference"] * 2 / 4 + found["format"]["share_of_all"]
    assert found["difference"] == pytest.approx(whole)
