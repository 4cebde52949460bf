"""Lengths: Kimi's reward, DAPO's punishment, and answers that ran out of tokens."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.shaping import length, overlong, shaped


def item(*rewards: dict[str, Any]) -> Item:
    parts = [{"weight": 1.0, "settings": {}, **part} for part in rewards]
    return Item("made_up", 0, 0, "What?", "7", {"scorer": "rewards", "rewards": parts, "row": {}})


def test_kimis_length_reward() -> None:
    assert length([True, True, False, False], [100, 200, 100, 300]) == [0.5, 0.0, 0.0, -0.5]
    assert length([True, False], [7, 7]) == [0.0, 0.0]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1000)), min_size=1, max_size=16))
def test_a_shorter_right_answer_never_earns_less(answers: list[tuple[bool, int]]) -> None:
    rewards = length([right for right, _ in answers], [tokens for _, tokens in answers])
    assert all(
        -0.5 <= reward <= (0.5 if right else 0.0) for reward, (right, _) in zip(rewards, answers, strict=True)
    )
    of_right = sorted(
        (tokens, -reward) for reward, (right, tokens) in zip(rewards, answers, strict=True) if right
    )
    assert [reward for _, reward in of_right] == sorted(reward for _, reward in of_right)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0)],  # DAPO's own lengths
)
def test_dapos_soft_punishment(tokens: int, expected: float) -> None:
    assert overlong(tokens, 20480, 4096) == overlong(tokens, 20480) == expected


def test_a_cache_longer_than_an_answer_may_be_is_all_of_it() -> None:
    assert overlong(5, 10, 99) == -0.5
    assert overlong(1, 1) == -1.0


def test_parts_join_the_total() -> None:
    asked = item({"use": "number"}, {"use": "length", "weight": 0.5}, {"use": "overlong"})
    right = Verdict("right", "7", 1.0, {"number": 1.0})
    wrong = Verdict("wrong", "8", 0.0, {"number": 0.0})
    first, second = shaped(asked, [right, wrong], [10, 100], [False, False], 100)
    assert first == Verdict("right", "7", 1.25, {"number": 1.0, "length": 0.5, "overlong": 0.0})
    assert second == Verdict("wrong", "8", -1.25, {"number": 0.0, "length": -0.5, "overlong": -1.0})


def test_an_answer_that_ran_out_of_tokens_earns_nothing_from_a_verifier() -> None:
    asked = item({"use": "number"}, {"use": "my.py:score"})
    [verdict] = shaped(asked, [Verdict("right", "7", 1.5, {"number": 1.0, "score": 0.5})], [9], [True], 9)
    assert (verdict.score, verdict.parts) == (0.5, {"number": 0.0, "score": 0.5})
    assert verdict.outcome == "unparsed"


def test_generators_and_failures_stay_as_they_are() -> None:
    generator = Item("chain_sum", 0, 0, "3 + 4", "7", {"scorer": "integer"})
    assert shaped(generator, [Verdict("right", "7")], [9], [True], 9) == [Verdict("right", "7")]
    failed = Verdict("error", error="a line")
    assert shaped(item({"use": "length"}), [failed, failed], [1, 2], [False, False], 9) == [failed, failed]
