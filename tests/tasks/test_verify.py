"""Verdicts on single completions."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.extract import plain_form
from farthing.tasks.item import CONVENTIONS, Convention, Item, Verdict
from farthing.tasks.plain import plain_text
from farthing.tasks.verify import verify


def item(answer: str, scorer: str = "integer", question: str = "What?", **facts: Any) -> Item:
    return Item("made_up", 0, 0, question, answer, {"scorer": scorer, **facts})


PUZZLE = item("4*8 - 6 - 2", "expression", numbers=[4, 8, 6, 2], target=24, operators=["+", "-", "*", "/"])


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("7", "7", "right"),
        ("7", "+7.0", "right"),
        ("1234", "1,234", "right"),
        ("-3", "−3", "right"),
        ("4287.5", "4,287.50", "right"),
        ("7", "7.5", "wrong"),
        ("7", "-7", "wrong"),
        ("7", "seven", "unparsed"),
        ("7", "7 or 8", "unparsed"),
        ("7", "７", "unparsed"),
        ("many", "7", "bad_gold"),
        ("", "7", "bad_gold"),
    ],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_integers(gold: str, answer: str, outcome: str, convention: Convention) -> None:
    verdict = verify(item(gold), plain_form(answer, convention), convention)
    assert verdict.outcome == outcome
    assert verdict.reward == (outcome == "right")
    assert (verdict.answer is None) == (outcome in ("unparsed", "bad_gold"))


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("Monday", "monday.", "right"),
        ("Monday", "**Monday**", "right"),
        ("Monday", "\\text{Monday}", "right"),
        ("0 0 1", "0  0 1", "right"),
        ("Monday", "Tuesday", "wrong"),
        ("Monday", "Monday or Tuesday", "wrong"),
        ("Monday", "Monday" + " " * 3000 + "or Tuesday", "wrong"),
        ("True", "Тrue", "wrong"),  # a Cyrillic T
        ("Monday", "...", "unparsed"),
        ("...", "...", "bad_gold"),
    ],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_texts(gold: str, answer: str, outcome: str, convention: Convention) -> None:
    assert verify(item(gold, "text"), plain_form(answer, convention), convention).outcome == outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("4*8 - 6 - 2", "right"),
        ("4 × 8 − (6 + 2)", "right"),
        ("4 + 8 + 6 + 2", "wrong"),
        ("24", "wrong"),
        ("4**8", "unparsed"),
        ("4//8 + 6 + 2", "unparsed"),
        ("9**9**9**9", "unparsed"),
        ("__import__('os')", "unparsed"),
    ],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_expressions(answer: str, outcome: str, convention: Convention) -> None:
    assert verify(PUZZLE, plain_form(answer, convention), convention).outcome == outcome


def test_a_puzzle_whose_own_answer_fails_is_bad() -> None:
    bad = item("4+8", "expression", numbers=[4, 8, 6, 2], target=24, operators="+-*/")
    assert verify(bad, "The answer is 4*8 - 6 - 2", "final") == Verdict("bad_gold")


def test_what_is_thought_is_no_answer() -> None:
    thought = "<think>3 + 4 = 6, no, = 7, so 8 - 1</think>"
    assert verify(item("7"), f"{thought}\n\n7", "final") == Verdict("right", "7")
    assert verify(item("7"), "<think>It is 7</think>", "final") == Verdict("unparsed")
    assert verify(item("7"), "<think><answer>7</answer></think>", "tag") == Verdict("unparsed")


def test_an_echo_of_the_question_is_no_answer() -> None:
    question = "Spell this word backward: level"
    echo = item("level", "text", question=question)
    assert verify(echo, question, "final").outcome == "unparsed"
    assert verify(echo, f"\n{question}\n", "final").outcome == "unparsed"
    assert verify(echo, f"{question}\nlevel", "final").outcome == "right"
    assert verify(item("5", question="What is 5?"), "What is 5? What is 5?", "final").outcome == "unparsed"


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(text=st.text(max_size=80), one=st.integers(-99, 99), two=st.integers(-99, 99))
def test_no_text_is_paid_for_two_answers(convention: Convention, text: str, one: int, two: int) -> None:
    for completion in (text, f"{text} {one} = {two}", plain_form(f"{one}{text}{two}", convention)):
        paid = {gold for gold in {one, two, 0, 7} if verify(item(str(gold)), completion, convention).reward}
        assert len(paid) <= 1


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(value=st.integers())
def test_the_right_integer_is_always_paid(convention: Convention, value: int) -> None:
    assert verify(item(str(value)), plain_form(f"{value:,}", convention), convention) == Verdict(
        "right", str(value)
    )


@given(st.text(max_size=60))
def test_texts_have_one_plain_form(text: str) -> None:
    assert plain_text(f'"{text.upper()}".') == plain_text(f"  {text.upper()}\n")
