"""Reading an answer from a completion."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.tasks.extract import LOOKED_AT, extract, plain_form, tail
from farthing.tasks.item import CONVENTIONS, Convention

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200) | st.lists(
    st.sampled_from(
        [
            "<answer>",
            "</answer>",
            "<think>",
            "</think>",
            "\\boxed",
            "{",
            "}",
            "=",
            ":",
            " is ",
            "\n",
            "7",
            "-",
            "8",
            "x",
        ]
    ),
    max_size=20,
).map("".join)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", "7"),
        ("3 + 4 = 7", "7"),
        ("3 + 4 = 7.", "7"),
        ("The answer is 7", "7"),
        ("The answer is **7**.", "7"),
        ("So there are 7 apples", "7"),
        ("Answer: -7", "-7"),
        ("of 3 and 4 THE SUM IS 7", "7"),
        ("3 are here; the rest Are 7", "7"),
        ("3 on this basis, 4 on an axis, 7 in Paris", None),
        ("3 isles, 7 areas", None),
        ("Final answer: \\boxed{7}", "7"),
        ("first 3, then 4: the total is 1,234 coins.", "1234"),
        ("x = 3\ny = 4\nx + y = $7$", "7"),
        (
            "The answer is 7. I'm sure this is right.",
            "7",
        ),  # the last clause holds none, the whole exactly one
        ("the answer", None),
        ("", None),
        ("= 7. And also 8", None),
        ("= 7 or 8", None),
        ("1 2 3 4 5 6 7 8 9", None),
        ("The answer is 1, 2, 3", None),
        ("3 + 4", None),
        ("3 + 4 =", None),
        ("3 and 4, which is easy", None),
        ("3 != 7", None),
        ("at 12:30", None),
        ("The answer is 7.5", "7.5"),
        ("the answer isn't 7 but 8", None),
    ],
)
def test_final_number(text: str, answer: str | None) -> None:
    assert extract(text, "final") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Monday", "Monday"),
        ("The day is Monday.", "Monday"),
        ("Let me see.\nAnswer: **Monday**\n\n", "Monday"),
        ("Answer: the day is Monday", "Monday"),
        ("Monday\nNo, wait", "No, wait"),
        ("Answer:", None),
        ("  \n ", None),
    ],
)
def test_final_text(text: str, answer: str | None) -> None:
    assert extract(text, "final", "text") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("<think>3 + 4</think>\n<answer> 7 </answer>\n\n", "7"),
        ("3 + 4</think> <answer>7</answer>", "7"),  # the prompt opened the thinking
        ("<answer>7</answer> 8", None),
        ("<answer>7</answer></think>", None),
        ("<answer>7", None),
        ("7</answer>", None),
        ("</answer>7<answer>", None),
        ("<answer></answer>", None),
        ("<answer><answer>7</answer></answer>", None),
        ("<answer>7</answer><answer>7</answer>", None),
        ("<think>3 <answer>7</answer>", None),
        ("<think>a</think><think><answer>7</answer>", None),
        ("<answer><think>3</think>7</answer>", None),
        ("\\boxed{7}", None),
    ],
)
def test_tag(text: str, answer: str | None) -> None:
    assert extract(text, "tag") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7}", "7"),
        ("So $\\boxed{\\text{Monday}}$.", "\\text{Monday}"),
        ("\\boxed{\\frac{1}{2}} as wanted", "\\frac{1}{2}"),
        ("\\boxed{7} = 8", None),
        ("\\boxed{7} ²", None),
        ("\\boxed{7", None),
        ("\\boxed 7", None),
        ("\\boxed{}", None),
        ("\\boxed{7}\\boxed{8}", None),
        ("\\boxed{\\boxed{7}}", None),
        ("<answer>7</answer>", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert extract(text, "boxed") == answer


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(text=ANY_TEXT, kind=st.sampled_from(["integer", "text", "expression"]))
def test_never_raises_and_gives_what_is_there(convention: Convention, text: str, kind: Any) -> None:
    answer = extract(text, convention, kind)
    assert answer is None or answer == answer.strip() != ""


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(value=st.integers(), before=st.text(alphabet="abc \n.,", max_size=50))
def test_round_trip(convention: Convention, value: int, before: str) -> None:
    assert extract(f"{before}\n{plain_form(str(value), convention)}", convention) == str(value)


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(
    one=st.integers(0, 999),
    two=st.integers(0, 999),
    between=st.text(alphabet="abc \n.,", min_size=1, max_size=9),
)
def test_of_two_answers_at_most_the_last_is_read(
    convention: Convention, one: int, two: int, between: str
) -> None:
    text = f"{plain_form(str(one), convention)}{between}{plain_form(str(two), convention)}"
    assert extract(text, convention) in (None, str(two))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    "piece",
    ["7 ", "9", "(", "{", "$*", "=", ": is ", "1,111", ",111", "1.", "<answer>", "\\boxed{", "<think>", "- ",
    "½", "\n", "a"],
)  # fmt: skip
def test_a_megabyte_takes_no_time(convention: Convention, piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    for kind in ("integer", "text"):
        started = time.process_time()
        extract(text, convention, kind)  # type: ignore[arg-type]
        assert time.process_time() - started < 2, "quadratic time would be minutes"


def test_only_the_end_is_looked_at_and_no_number_is_cut_in_two() -> None:
    assert extract("8 " * LOOKED_AT + plain_form("7", "tag"), "tag") == "7"
    assert tail("123" + "4" * (LOOKED_AT - 5) + " and 5").strip() == "and 5"
    text = "word " * LOOKED_AT
    assert len(tail(text)) <= LOOKED_AT
    assert tail(tail(text)) == tail(text)


def test_an_unknown_convention_is_named() -> None:
    with pytest.raises(UserError, match="no convention 'xml'; choose final or tag or boxed"):
        extract("7", "xml")  # type: ignore[arg-type]
