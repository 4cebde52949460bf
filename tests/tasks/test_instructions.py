"""IFEval's instructions: an answer that follows each, and one that does not."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.instructions import CHECKS, follows, sentences, unchecked

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["river", "Boat"]}, ["A boat on the River."], ["A boat."]),
    "keywords:frequency": (
        {"keyword": "tea", "frequency": 2, "relation": "at least"}, ["Tea and tea"], ["tea", "coffee"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["very", "bad"]}, ["badly every"], ["Very good"]),
    "keywords:letter_frequency": (
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, ["Quite"], ["quick Queen"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"}, ["One. Two, at 3.5 by Mr. Hill!", "One"], ["A. b. c? So. It."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["one\n***\ntwo", "one\n***\ntwo\n***"], ["one", "a\n***\n***\nb", "a\n***\nb\n***\nc"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"}, ["one two three"], ["one two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        ["a\n\nSo, b", "a\n\n\"so\" b"], ["So\n\na", "a\n\nb\n\nso", "a\n\nsome"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [place]"], ["[name] of ["]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S. more", "p.p.s more"], ["P.S. more"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "* a\n* b\n- c", "**a**\n* b"],
    ),
    "detectable_format:constrained_response": ({}, ["My answer is no."], ["No.", "my answer is no"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*a* and **b c**"], ["*a*", "* a\n* b", "** **"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, ["Part 1\na\nPart 2\nb"], ["Part 1\na", "Part one, Part two"],
    ),
    "detectable_format:json_format": ({}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", "{} and more"]),
    "detectable_format:title": ({}, ["<<A song>>\nLa"], ["<A song>", "<< >>"]),
    "combination:two_responses": ({}, ["one ****** two"], ["one", "one ****** one", "a ****** b ****** c"]),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Write a poem."}, ["write a poem.\n\nRoses"], ["Roses", "Here: Write a poem."],
    ),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, ["So. any questions?"], ["Any questions? No."]),
    "startend:quotation": ({}, ['"All of it."'], ['"', '"All" of it', "'All'"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, ["STOP the CAR-PARK"], ["STOP the Car"],
    ),
    "change_case:english_capital": ({}, ["ALL OF IT, 3."], ["All"]),
    "change_case:english_lowercase": ({}, ["all of it, 3."], ["All"]),
    "punctuation:no_comma": ({}, ["One; two."], ["One, two"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_an_instruction_is_followed_or_not(name: str) -> None:
    arguments, good, bad = CASES[name]
    assert [follows(text, name, arguments) for text in good] == [True] * len(good)
    assert [follows(text, name, arguments) for text in bad] == [False] * len(bad)
    assert not follows(" \n", name, arguments)
    assert unchecked({"instruction_id_list": [name], "kwargs": [{**arguments, "language": None}]}) is None


@given(st.text(max_size=60), st.sampled_from(sorted(CASES)))
def test_any_text_is_judged(text: str, name: str) -> None:
    assert follows(text, name, CASES[name][0]) in (True, False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("...", 0), ("One", 1), ("One. Two! Three?", 3), ("At 3.5, Dr. Hill said “no.” So", 2)],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no lists"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "no lists of the same length"),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]},
            "nobody here checks",
        ),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "are not what they take"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [None]}, "are not what they take"),
    ],
)
def test_instructions_that_cannot_be_checked_say_why(row: dict[str, Any], why: str) -> None:
    assert re.search(why, unchecked(row) or "")
