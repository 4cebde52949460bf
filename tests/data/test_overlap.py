"""`HeldOut`: questions found however they are wrapped, and no other question taken for one."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest

from farthing.data.overlap import RUN, HeldOut
from farthing.tasks.gym import load_task

PARAPHRASES = Path(__file__).parent / "paraphrases.jsonl"
NEVER = "other numbers"
QUESTION = (
    "A bakery bakes 240 rolls each morning. It sells two thirds of them before noon and 45 more in the afternoon. How "
    "many rolls are left at closing time?"
)


def test_nothing_is_found_by_an_empty_index() -> None:
    assert not HeldOut()
    assert HeldOut().match("What is 12 + 30?") is None
    assert HeldOut(["", "?!"]).match("") is None


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("what is 12+30", "exact"),
        ("Calculate 12 + 30. Let's think step by step.", "exact"),
        ("My cat asks: what is 12 + 30? She cannot add.", "contained"),
        (f"Read on.\n\n{QUESTION}\n\nAnswer: 35", "contained"),
        (QUESTION.replace("A bakery", "Hanna"), "shared"),
    ],
)
def test_how_a_question_is_found(text: str, how: str) -> None:
    found = HeldOut(["What is 12 + 30?", QUESTION]).match(text)
    assert found is not None
    assert found.how == how
    assert found.text == ["What is 12 + 30?", QUESTION][found.question]
    assert (found.share < 1) == (how == "shared")


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 + 31?",
        "What is 12 + 30 + 5?",
        "What is 12 + 30 * 5?",
        "What is 12 + 30%?",
        "Note -12 + 30, then what is 12 - 30?",
        QUESTION.replace("240", "250"),
        QUESTION.replace("240", "45").replace("45 more", "240 more"),
        QUESTION[: len(QUESTION) // 2],
        "12 men ate 30 + 1 rolls. " * 50,
    ],
)
def test_another_question_is_not_found(text: str) -> None:
    assert HeldOut(["What is 12 + 30?", QUESTION]).match(text) is None


def test_a_list_that_goes_on_is_another_question() -> None:
    held_out = HeldOut(["Sort these numbers: 12, 18"])
    assert held_out.holds("Please sort these numbers: 12, 18. Quickly!")
    assert not held_out.holds("Please sort these numbers: 12, 18, 24. Quickly!")


def test_what_questions_have_in_common_proves_nothing() -> None:
    template = (
        "Read the following sentence with care and then say in one word which animal it is about, please: {}"
    )
    held_out = HeldOut([template.format(f"the {animal} sleeps") for animal in ("cat", "dog", "owl")])
    assert held_out.holds("So: " + template.format("the owl sleeps"))
    assert not held_out.holds("So: " + template.format("the fox sleeps"))


def test_every_question_of_a_text_is_named_once() -> None:
    held_out = HeldOut(["What is 12 + 30?", QUESTION, "What is 7 * 8?"])
    text = f"What is 12 + 30? {QUESTION} What is 12 + 30?"
    assert sorted(found.question for found in held_out.matches(text)) == [0, 1]


def test_a_question_across_two_pieces_of_a_book_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.data.overlap._AT_ONCE", 1000)
    held_out = HeldOut([QUESTION])
    for before in range(900, 1010, 7):
        assert held_out.holds(("word " * 400)[:before] + QUESTION + " word" * 300)
    assert not held_out.holds("word " * 2000)


def test_the_words_must_lie_near_each_other() -> None:
    halves = QUESTION[:75], QUESTION[75:]
    assert HeldOut([QUESTION]).holds(" so ".join(halves))
    assert not HeldOut([QUESTION]).holds((" so " * 200).join(halves))


def test_sentences_name_the_question_and_count_as_one_reason() -> None:
    from farthing.data.left_out import reason

    held_out = HeldOut(["What is (12 + 30)?", "What is 7 * 8?"])
    said = [f"a.jsonl:{n}: {held_out.match(q).sentence}; left out" for n, q in enumerate(held_out.questions)]  # type: ignore[union-attr]
    assert said[0] == 'a.jsonl:0: it is a held-out question ("What is [12 + 30]?"); left out'
    assert {reason(sentence) for sentence in said} == {"it is a held-out question"}


@pytest.mark.parametrize("name", ["chain_sum", "products"])
def test_no_generated_question_is_taken_for_another(name: str) -> None:
    """Small numbers, so that nearly every question is near another."""
    config = {"min_digits": 1, "max_digits": 2}
    task = load_task(name, {"min_terms": 2, "max_terms": 4, **config})
    held_out = HeldOut({task.item(7, n).question for n in range(150)})
    for number in range(1500):
        question = task.item(10**6, number).question
        asked = f"Solve this.\n\n{question}\nThink step by step."
        assert held_out.holds(question) == held_out.holds(asked) == (question in held_out.questions)


def caught() -> dict[str, list[bool]]:
    rows = [json.loads(line) for line in PARAPHRASES.read_text(encoding="utf-8").splitlines()]
    held_out = HeldOut(dict.fromkeys(row["question"] for row in rows))
    found: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        found[row["kind"]].append(row["question"] in {one.text for one in held_out.matches(row["text"])})
    return found


def test_the_table_of_what_is_found_says_what_is_found() -> None:
    from farthing.evaluate.intervals import wilson

    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for kind, found in caught().items():
        low, high = (round(100 * bound) for bound in wilson(sum(found), len(found)))
        assert f"| {kind} | {sum(found)} of {len(found)} | {low}% to {high}% |" in docs
    assert not any(caught()[NEVER])


def test_the_table_does_not_depend_on_the_order_of_the_questions() -> None:
    rows = [json.loads(line) for line in PARAPHRASES.read_text(encoding="utf-8").splitlines()]
    questions = sorted({row["question"] for row in rows})
    Random(0).shuffle(questions)
    held_out = HeldOut(questions)
    assert sum(held_out.holds(row["text"]) for row in rows) == sum(map(sum, caught().values()))
    assert RUN == 5
