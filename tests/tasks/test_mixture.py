"""Held-out items and the training stream."""

from collections import Counter

import pytest

from farthing.base.errors import UserError
from farthing.data.overlap import HeldOut
from farthing.data.words import question_key
from farthing.tasks.mixture import Mixture

TINY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 questions: 0..9 ± 0..9
TASKS = {"chain_sum": {"weight": 2, "config": {"max_terms": 3}}, "gcd": 1}


def test_held_out_is_stratified_distinct_and_always_the_same() -> None:
    held = Mixture(TASKS, seed=3).held_out(100)
    assert held == Mixture(TASKS, seed=3).held_out(100)
    assert Counter(item.task for item in held) == {"chain_sum": 67, "gcd": 33}
    assert len({question_key(item.question) for item in held}) == 100
    assert len({item.task for item in held[:20]}) == 2  # in mixed order
    assert held != Mixture(TASKS, seed=4).held_out(100)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_shares_add_up(n: int) -> None:
    mixture = Mixture({"chain_sum": 1, "gcd": 1, "lcm": 1, "products": 0.2}, seed=0)
    assert len(mixture.held_out(n)) == n


def test_the_stream_never_shows_a_held_out_question() -> None:
    mixture = Mixture({"chain_sum": {"weight": 1, "config": TINY}}, seed=0)
    exclude = {question_key(item.question) for item in mixture.held_out(60)}
    items, cursor = mixture.stream(HeldOut(exclude)).take(0, 500)
    assert len(items) == 500
    assert not exclude & {question_key(item.question) for item in items}
    assert cursor > 600  # without the exclusion 500 places would have done


def test_the_stream_resumes_from_its_cursor_alone() -> None:
    exclude = HeldOut(item.question for item in Mixture(TASKS, seed=3).held_out(50))
    whole, end = Mixture(TASKS, seed=3).stream(exclude).take(10, 30)
    stream = Mixture(TASKS, seed=3).stream(exclude)
    first, cursor = stream.take(10, 13)
    stream.take(0, 5)  # asking for something else changes nothing
    rest, last = Mixture(TASKS, seed=3).stream(exclude).take(cursor, 17)
    assert (first + rest, last) == (whole, end)


def test_the_stream_follows_the_weights_and_the_seed() -> None:
    items, cursor = Mixture(TASKS, seed=0).stream(HeldOut()).take(0, 600)
    assert cursor == 600
    assert 350 < Counter(item.task for item in items)["chain_sum"] < 450
    other = Mixture(TASKS, seed=1).stream(HeldOut()).take(0, 600)[0]
    assert len({item.question for item in items} & {item.question for item in other}) < 100


def test_train_and_held_out_draw_from_different_seeds() -> None:
    mixture = Mixture(TASKS, seed=0)
    held = mixture.held_out(20)
    trained = [mixture.train(index) for index in range(20)]
    assert min(item.seed for item in held) > max(item.seed for item in trained) + 2**29
    assert mixture.train(5) == trained[5]


def test_too_few_questions_to_hold_out() -> None:
    mixture = Mixture({"chain_sum": {"weight": 1, "config": TINY}}, seed=0)
    with pytest.raises(
        UserError, match=r"chain_sum has only about 200 different questions .* 400 were .* fewer"
    ):
        mixture.held_out(400)


def test_too_few_questions_left_to_train_on() -> None:
    mixture = Mixture({"chain_sum": {"weight": 1, "config": TINY}}, seed=0)
    exclude = HeldOut(item.question for item in mixture.held_out(195))
    with pytest.raises(
        UserError, match=r"chain_sum has so few different questions .* hold out fewer or widen"
    ):
        mixture.stream(exclude)


def test_nothing_left_is_noticed_while_streaming() -> None:
    mixture = Mixture({"chain_sum": {"weight": 1, "config": TINY}}, seed=0)
    stream = mixture.stream(HeldOut())
    stream.exclude = HeldOut(mixture.train(index).question for index in range(2500))
    with pytest.raises(UserError, match="chain_sum has so few different questions"):
        stream.take(0, 1)


@pytest.mark.parametrize("weight", [0, -1, "much", float("nan"), float("inf"), None])
def test_weights_are_numbers_above_zero(weight: object) -> None:
    with pytest.raises(UserError, match="the weight of gcd must be a number above 0"):
        Mixture({"gcd": weight}, seed=0)  # type: ignore[dict-item]


def test_no_tasks() -> None:
    with pytest.raises(UserError, match="there are none"):
        Mixture({}, seed=0)
