"""choice, exact, regex, json, format and math: what they pay, and what they do not."""

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.tasks.item import Convention, Item
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.choice import letter_of
from farthing.tasks.rewards.json import canonical
from farthing.tasks.verify import verify

CITIES = ["Rome", "Paris", "Oslo", "none of these"]


def item(use: str, answer: str = "", choices: Sequence[str] = (), **its: Any) -> Item:
    rewards = [{"use": use, "weight": 1.0, "settings": its}]
    facts = {"scorer": "rewards", "rewards": rewards, "row": {}, **({"choices": choices} if choices else {})}
    return Item("made_up", 0, 0, "Which?", answer, facts)


def outcome(asked: Item, text: str, convention: Convention = "final") -> str:
    verdict = verify(asked, text, convention)
    assert verdict.reward == (verdict.outcome == "right")
    return verdict.outcome


# ---- choice ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "right"),
        ("(B)", "right"),
        ("b)", "right"),
        ("B. Paris", "right"),
        ("B: Paris", "right"),
        ("**B**", "right"),
        ("Paris", "right"),
        ("The answer is B.", "right"),
        ("The answer is (B) Paris.", "right"),
        ("The answer is Paris", "right"),
        ("Answer: B", "right"),
        ("Rome is too far south.\nSo I choose B", "right"),
        ("I pick option (B).", "right"),
        ("A", "wrong"),
        ("The answer is Rome.", "wrong"),
        ("none of these", "wrong"),
        ("Rome? Maybe.\n\nSo it is \\boxed{B}.", "right"),
        ("<think>A\nB\nC</think>B", "right"),
        ("A\n\nSo the answer is B", "right"),
        ("B. Paris\nThe answer is B", "right"),
        ("A\nB\nC\nD", "unparsed"),
        ("C\nA\nB", "unparsed"),
        ("A. Rome\nC. Oslo\nB. Paris", "unparsed"),
        ("Rome\nOslo\nParis", "unparsed"),
        ("The answer is A. The answer is B.", "unparsed"),
        ("Answer: A\nAnswer: **B**", "unparsed"),
        ("E", "unparsed"),
        ("B. Rome", "unparsed"),
        ("A or B", "unparsed"),
        ("A, B", "unparsed"),
        ("B C", "unparsed"),
        ("The answer is not B", "unparsed"),
        ("I would never choose B", "unparsed"),
        ("A good city", "unparsed"),
        ("Paris or Rome", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_one_choice(text: str, expected: str) -> None:
    assert outcome(item("choice", "B", CITIES), text) == expected
    assert outcome(item("choice", "Paris", CITIES), text) == expected


def test_choices_in_tags_and_boxes() -> None:
    asked = item("choice", "B", CITIES)
    for answer in ("B", "(B)", "Paris", "\\text{B}", "\\text{(B)}", "B) Paris"):
        assert outcome(asked, f"\\boxed{{{answer}}}", "boxed") == "right", answer
        assert outcome(asked, f"<answer>{answer}</answer>", "tag") == "right", answer
    assert outcome(asked, "\\boxed{A, B}", "boxed") == "unparsed"
    assert outcome(asked, "<answer>A</answer><answer>B</answer>", "tag") == "unparsed"


def test_a_gold_answer_that_is_no_choice_is_bad() -> None:
    assert outcome(item("choice", "E", CITIES), "B") == "bad_gold"
    assert outcome(item("choice", "London", CITIES), "B") == "bad_gold"
    assert outcome(item("choice", "B"), "B") == "right"
    assert outcome(item("choice", "Paris"), "B") == "bad_gold"
    assert letter_of("same", ["same", "same"]) is None


# ---- exact ----


def test_exact_texts() -> None:
    assert outcome(item("exact", "New York"), "The answer is new  york.") == "right"
    assert outcome(item("exact", "New York"), "The answer is York") == "wrong"
    assert outcome(item("exact", "New York", case=True), "The answer is new york") == "wrong"
    assert outcome(item("exact", "New York", case=True), "\\boxed{\\text{New York}}", "boxed") == "right"
    assert outcome(item("exact", "..."), "...") == "bad_gold"
    assert outcome(item("exact", "x"), "") == "unparsed"


# ---- regex ----


def test_patterns() -> None:
    assert outcome(item("regex", pattern="(?i)^dear "), "Dear Ann,") == "right"
    assert outcome(item("regex", pattern="(?i)^dear "), "Oh dear Ann,") == "wrong"
    caught = item("regex", "7", pattern=r"RESULT=(\d+)")
    assert outcome(caught, "RESULT=8 RESULT=7") == "right"
    assert outcome(caught, "RESULT=7 RESULT=8") == "wrong"
    assert outcome(caught, "7") == "unparsed"
    assert outcome(item("regex", "", pattern="(x)"), "x") == "bad_gold"


def test_a_pattern_that_takes_for_ever_is_cut_off() -> None:
    slow = item("regex", pattern="^(?:a+)+$")
    with VerifierPool(1, timeout=0.3) as pool:
        verdicts = pool.verify([(slow, "a" * 40 + "b"), (slow, "aaa")], "final")
    assert [verdict.outcome for verdict in verdicts] == ["timeout", "right"]


# ---- json ----

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="needs farthing[json]")
def test_schemas() -> None:
    asked = item("json", schema=SCHEMA)
    fine = '{"name": "Ann", "age": 3}'
    assert outcome(asked, fine) == "right"
    assert outcome(asked, f"Here it is:\n```json\n{fine}\n```\nDone.") == "right"
    assert outcome(asked, f"<answer>{fine}</answer>", "tag") == "right"
    assert outcome(asked, f"```\n{fine}\n```\n```\n{fine}\n```") == "unparsed"
    assert outcome(asked, f"{fine} {fine}") == "unparsed"
    assert outcome(asked, '{"name": "Ann", "age": -1}') == "wrong"
    assert outcome(asked, '{"name": "Ann", "age": 1, "x": 0}') == "wrong"
    assert outcome(asked, '{"name": "Ann", "age": 1, "age": -1}') == "unparsed"
    assert outcome(asked, '{"name": "Ann", "age": NaN}') == "unparsed"
    assert outcome(asked, "[" * 100_000) == "unparsed"
    far = item("json", schema={"$ref": "http://127.0.0.1:9/schema.json"})
    with VerifierPool(1) as pool:
        [verdict] = pool.verify([(far, fine)], "final")
    assert verdict.outcome == "error"
    assert verdict.error
    assert "schema" in verdict.error


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"b": [1, 2.0], "a": null}', "right"),
        ('{"b": [2, 1], "a": null}', "wrong"),
        ('{"b": [true, 2], "a": null}', "wrong"),
        ("null", "wrong"),
        ("no", "unparsed"),
    ],
)
def test_equal_values(answer: str, expected: str) -> None:
    assert outcome(item("json", '{"a": null, "b": [1, 2]}', equal=True), answer) == expected


def test_what_is_thought_is_no_part_of_the_answer() -> None:
    for text in ('<think>{"a": 2}</think>{"a": 1}', '<think>\n```\n2\n```\n</think>\n```json\n{"a": 1}\n```'):
        assert outcome(item("json", '{"a": 1}', equal=True), text) == "right"
    assert outcome(item("exact", "Oslo"), "<think>Paris?</think>Oslo") == "right"
    assert outcome(item("number", "7"), "<think>Is it 8, or 7?</think>7") == "right"
    assert outcome(item("number", "7"), "7</think>8") == "wrong"


def test_json_golds() -> None:
    assert outcome(item("json", "null", equal=True), "null") == "right"
    assert outcome(item("json", "{", equal=True), "{}") == "bad_gold"


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_a_value_equals_itself_however_written(value: Any) -> None:
    assert canonical(json.loads(json.dumps(value, indent=3))) == canonical(value)
    assert outcome(item("json", json.dumps(value), equal=True), json.dumps(value)) == "right"


# ---- format ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nhm\n</think>\n<answer>\n7\n</answer>", "right"),
        ("  <think>hm</think><answer>7</answer>\n", "right"),
        ("<think></think><answer>7</answer>", "wrong"),
        ("<think>hm</think><answer> </answer>", "wrong"),
        ("<think>hm</think><answer>7</answer> and more", "wrong"),
        ("Well, <think>hm</think><answer>7</answer>", "wrong"),
        ("<think>hm</think> so <answer>7</answer>", "wrong"),
        ("<answer>7</answer><think>hm</think>", "wrong"),
        ("<think>a<think>b</think></think><answer>7</answer>", "wrong"),
        ("<think>hm</think><answer>7</answer><answer>8</answer>", "wrong"),
        ("hm</think><answer>7</answer>", "wrong"),
        ("<answer>7</answer>", "wrong"),
        ("", "wrong"),
    ],
)
def test_the_form_of_r1(text: str, expected: str) -> None:
    assert outcome(item("format"), text) == expected


# ---- math ----


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs farthing[math]")
def test_formulas_that_would_take_for_ever_cost_one_verdict() -> None:
    asked = item("math", "x^2")
    towers = [
        "9^{9^{9^9}}",
        "9**9**9**9",
        "((9!)!)!",
        "(" * 500 + "x" + ")" * 500,
        "x" * 5000,
        "2^{99999999}",
    ]
    texts = [f"\\boxed{{{tower}}}" for tower in towers]
    with VerifierPool(1) as pool:
        outcomes = [
            v.outcome for v in pool.verify([(asked, text) for text in [*texts, "\\boxed{x*x}"]], "boxed")
        ]
    assert outcomes == ["wrong"] * len(texts) + ["right"]
    assert outcome(item("math", ""), "\\boxed{x}", "boxed") == "bad_gold"
