"""`words`: one spelling for what is the same, and different words for what is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.data.words import is_picture, question_key, words

SAME = [
    [
        "What is 12 - 30?",
        " what  IS\n12−30 ?",
        "What is $12 - 30$?",
        "**What** is 12 – 30",
        "What is 12 &minus; 30",
    ],
    ["2 * 3", "2 × 3", "2 \\times 3", "2·3", "2 x 3", "2 \\* 3", "$2 \\cdot 3$", "２＊３"],
    ["1000 apples", "1,000 apples", "1{,}000\\ apples", "1\u202f000 apples", "1000.00 apples"],
    ["café's 3", "cafe\u0301’s three", "CAFÉ\u200bs 3", "cafes ٣"],
    ["1/2 + x^2", "\\frac{1}{2} + x²", "½ + x**2", "\\dfrac12 + x^2".replace("12", "{1}{2}")],
    ["(3x + 5)/2", "\\frac{3x + 5}{2}"],
    ["which gas? a oxygen b helium", "Which gas?\nA) oxygen\nB) helium", "Which gas? (A) oxygen (B) helium"],
    ["what is 3 * 4 - 2", "What  is 3  x  4  -  2?", "What is 3\t*\t4 - \t2?"],
    ["20 year old T shirt", "20-year-old T-shirt", "20‑year‑old t‐shirt"],
]
OTHER = [
    ("12 + 30", "12 + 31"),
    ("3 + 4", "34"),
    ("-3", "3"),
    ("3 - 4", "3 + 4"),
    ("5!", "5"),
    ("x = 3", "x ≠ 3"),
    ("2½", "21/2"),
    ("x²", "x2"),
    ("3.5", "35"),
    ("1,000", "1.000001"),
    ("(3 + 4) * 5", "3 + 4 * 5"),
    ("0x12", "0x21"),
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_the_same_are_the_same(spellings: list[str]) -> None:
    assert {question_key(spelling) for spelling in spellings} == {question_key(spellings[0])}


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_differs_stays_different(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)


def test_scripts_without_spaces_are_read_character_by_character() -> None:
    assert words("三个苹果12个") == ["三", "个", "苹", "果", "12", "个"]


def test_a_picture_keeps_its_signs() -> None:
    one, other = ("Read this:\n" + row * 4 for row in ("## #_#_ ##\n", "#_ ## ## #\n"))
    assert is_picture(one)
    assert question_key(one) != question_key(other)
    assert not is_picture("What is 12 + 30? (Think!)")


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_has_words_and_its_key_is_its_own_key(text: str) -> None:
    assert all(words(text))
    if not is_picture(text):
        assert "=" not in question_key(text)[-1:]
