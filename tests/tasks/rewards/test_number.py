"""Numbers as GSM8K writes them, and as models do."""

import pytest

from farthing.tasks.extract import plain_form
from farthing.tasks.item import CONVENTIONS, Convention, Item
from farthing.tasks.rewards.number import number_of
from farthing.tasks.verify import verify

# In the manner of GSM8K's worked solutions, in words of our own.
SOLUTIONS = [
    ("Ann picks 12 pears and 5 plums, so she has 12 + 5 = <<12+5=17>>17 fruits.\n#### 17", "17"),
    ("Each of 4 boxes costs $1.50, which is 4 * 1.5 = $<<4*1.5=6>>6.\n#### 6", "6"),
    ("A year brings 12 * 200 = <<12*200=2400>>2,400 coins.\n#### 2,400", "2400"),
    ("He owes 5 - 12 = <<5-12=-7>>-7.\n#### -7", "-7"),
    ("Half of it is 0.5 * 7 = <<0.5*7=3.5>>3.5 litres.\n#### 3.50", "3.5"),
]


def item(gold: str, **settings: object) -> Item:
    rewards = [{"use": "number", "weight": 1.0, "settings": settings}]
    return Item("made_up", 0, 0, "How many?", gold, {"scorer": "rewards", "rewards": rewards, "row": {}})


@pytest.mark.parametrize(("solution", "number"), SOLUTIONS)
def test_a_worked_solution_of_gsm8k_is_gold_and_pays_itself(solution: str, number: str) -> None:
    assert number_of(solution) == number
    assert verify(item(solution), solution, "final").outcome == "right"
    for convention in CONVENTIONS:
        verdict = verify(item(solution), plain_form(number, convention), convention)
        assert (verdict.outcome, verdict.reward, verdict.parts) == ("right", 1.0, {"number": 1.0})


@pytest.mark.parametrize(
    ("text", "convention", "outcome"),
    [
        ("So she has 17 apples.", "final", "right"),
        ("12 + 5 = 17\n#### 17", "final", "right"),
        ("12 + 5 = 17\n#### 18", "final", "wrong"),
        ("#### 17 or 18", "final", "unparsed"),
        ("#### 17\n#### 18", "final", "wrong"),
        ("The answer is 17.\n#### Thanks", "final", "right"),
        ("#### 17", "boxed", "unparsed"),
        ("", "final", "unparsed"),
    ],
)
def test_what_is_read(text: str, convention: Convention, outcome: str) -> None:
    assert verify(item("17"), text, convention).outcome == outcome


def test_a_marker_of_ones_own() -> None:
    asked = item("17", after="Result:")
    assert verify(asked, "It is 3. Result: 17", "boxed").outcome == "right"
    assert verify(asked, "It is 17", "boxed").outcome == "unparsed"
    assert verify(asked, "Result: 17, or Result: 18", "final").outcome == "wrong"


def test_a_gold_answer_that_is_no_number_is_bad() -> None:
    verdict = verify(item("many"), "The answer is 17", "final")
    assert (verdict.outcome, verdict.reward) == ("bad_gold", 0.0)


def test_an_echo_of_the_question_is_no_answer() -> None:
    asked = item("17")
    echo = Item(asked.task, 0, 0, "The answer is 17", "17", asked.metadata)
    assert verify(echo, "The answer is 17", "final").outcome == "unparsed"
