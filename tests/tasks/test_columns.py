"""Templates over columns, where answers are found, and options to choose from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.recipe import Gold
from farthing.tasks.columns import Template, Unusable, holds, last_boxed, reading


def read(row: dict[str, Any], **asked: Any) -> Any:
    gold = asked.pop("answer", None)
    made = reading(
        asked.get("question"),
        Gold.model_validate(gold) if gold else None,
        asked.get("choices"),
        [row],
        "tasks: mine",
        asked.get("needs_answer", True),
    )
    return made.read(row)


# ---- templates ----


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("question", "What is {x}?"),
        ("Solve {question} in \\boxed{{}}.", "Solve What is {x}? in \\boxed{}."),
        ("{ n } of {deep.er.0}", "3 of first"),
        ("{dotted.name}", "whole"),
        ("{list}", "one\ntwo"),
        ("{yes} {half}", "true 0.5"),
        ("{{{n}}}", "{3}"),
    ],
)
def test_a_template_is_filled_in_from_columns(template: str, text: str) -> None:
    row = {
        "question": "What is {x}?", "n": 3, "deep": {"er": ["first"]}, "dotted.name": "whole", "list": ["one", "two"],
        "yes": True, "half": 0.5,
    }  # fmt: skip
    assert Template(template, "here").fill(row) == text


@pytest.mark.parametrize("template", ["{question", "question}", "{}", "{ }", "a {b{c}}"])
def test_a_brace_alone_is_refused(template: str) -> None:
    with pytest.raises(
        UserError, match=r"^tasks: t: question: .* names no column; write \{column\}, and \{\{ \}\}"
    ):
        Template(template, "tasks: t: question")


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.text(max_size=9), max_size=3), st.text(max_size=20)
)
def test_what_a_row_holds_is_never_a_template(row: dict[str, str], text: str) -> None:
    row = {**row, "a": text}
    assert Template("<{a}>", "").fill(row) == f"<{text}>"


# ---- columns found by the names in use ----


def test_peers_columns_are_known() -> None:
    trl = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}],
           "solution": "so $\\boxed{7}$."}  # fmt: skip
    found = read(trl)
    assert (found.question, found.answer, found.system, found.solution) == (
        "3 + 4?", "7", "Be brief.", "so $\\boxed{7}$.",
    )  # fmt: skip
    verl = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "3 + 4?"}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 0}}  # fmt: skip
    assert (read(verl).question, read(verl).answer) == ("3 + 4?", "7")
    gsm8k = {"question": "3 + 4?", "answer": "It is 3+4 = <<3+4=7>>7.\n#### 7"}
    assert (read(gsm8k).answer, read(gsm8k).solution) == ("7", "It is 3+4 = 7.")
    plain = {"problem": " 3 + 4? ", "answer": 7}
    assert (read(plain).question, read(plain).answer, read(plain).solution) == ("3 + 4?", "7", None)


def test_a_missing_column_names_those_there_are_and_the_nearest() -> None:
    row = {"question": "?", "answer": "7", "reward_model": {"ground_truth": "7"}}
    with pytest.raises(
        UserError,
        match=r"^tasks: mine: question: there is no column 'questoin'; did you mean question\? there are q",
    ):
        read(row, question="questoin")
    with pytest.raises(
        UserError, match=r"answer: there is no column 'reward_model.truth'; .*reward_model.ground_truth"
    ):
        read(row, answer="reward_model.truth")
    with pytest.raises(
        UserError, match=r"no column is known as the question; say question: COLUMN \(there are a\)"
    ):
        read({"a": "b"})
    with pytest.raises(UserError, match=r"no column is known as the answer; say answer: COLUMN"):
        read({"question": "b"})
    assert read({"question": "b"}, needs_answer=False).answer == ""


# ---- answers ----


@pytest.mark.parametrize(
    ("gold", "value", "answer"),
    [
        ("answer", "7", "7"),
        ("answer", 7, "7"),
        ("answer", ["7"], "7"),
        ("answer", {"a": 1}, '{"a": 1}'),
        ("{answer} m", 7, "7 m"),
        ({"column": "answer", "after": "####"}, "1 #### 2\n#### 1,234 ", "1,234"),
        ({"column": "answer", "boxed": True}, r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ],
)
def test_where_an_answer_is(gold: Any, value: Any, answer: str) -> None:
    assert read({"question": "?", "answer": value}, answer=gold).answer == answer


@pytest.mark.parametrize(
    ("gold", "value", "why"),
    [
        ("answer", None, "has no 'answer'"),
        ("answer", " ", "is empty"),
        ({"column": "answer", "after": "####"}, "7", "has no '####'"),
        ({"column": "answer", "after": "####"}, "7 ####", "is empty"),
        ({"column": "answer", "boxed": True}, r"\boxed{7", r"has no \\boxed"),
    ],
)
def test_a_row_without_an_answer_says_why(gold: Any, value: Any, why: str) -> None:
    made = reading("question", Gold.model_validate(gold), None, [{"question": "?", "answer": "x"}], "", True)
    with pytest.raises(Unusable, match=why):
        made.read({"question": "?", "answer": value})


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{a} \boxed{b}", "b"), (r"\boxed{a} \boxed{b", "a"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a{b}c}d}", "a{b}c"), ("boxed{a}", None), (r"\boxed a", "a"),
        (r"so $\boxed 9$.", "9"), (r"\fbox{9}", "9"), (r"\boxed {9}", "9"), (r"\boxed", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_whole_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    "prompt",
    [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        [{"role": "assistant", "content": "b"}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        [{"role": "user"}],
        [1, 2],
        {"a": 1},
        None,
        "  ",
    ],
)
def test_what_is_no_single_question_is_unusable(prompt: Any) -> None:
    made = reading("prompt", Gold(column="answer"), None, [{"prompt": "a", "answer": "b"}], "", True)
    with pytest.raises(Unusable):
        made.read({"prompt": prompt, "answer": "7"})


# ---- options ----

PLANETS = ["Mars", "Venus", "Earth"]


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (PLANETS, 1, "B"),  # MMLU
        (PLANETS, "2", "C"),  # HellaSwag
        ({"text": PLANETS, "label": ["A", "B", "C"]}, "B", "B"),  # ARC
        ({"text": PLANETS, "label": ["1", "2", "3"]}, "2", "B"),
        ({"A": "Mars", "B": "Venus", "C": "Earth"}, "C", "C"),
        (PLANETS, "Venus", "B"),
        (PLANETS, "b", "B"),
        ('["Mars", "Venus", "Earth"]', "A", "A"),
        ([10, 20, 30], 20, "B"),
        (["1", "2", "3"], "3", "C"),
    ],
)
def test_the_answer_is_the_letter_of_an_option(choices: Any, answer: Any, letter: str) -> None:
    found = read({"question": "Which?", "choices": choices, "answer": answer})
    assert found.answer == letter
    assert found.question.splitlines()[0] == "Which?"
    assert found.question.splitlines()[2] == f"B. {found.choices[1]}"


def test_a_template_may_place_the_options() -> None:
    row = {"stem": "Which?", "choices": PLANETS, "answer": 0}
    found = read(row, question="{stem} Choose:\n{choices}\nOne letter.")
    assert found.question == "Which? Choose:\nA. Mars\nB. Venus\nC. Earth\nOne letter."


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (PLANETS, 3),
        (PLANETS, -1),
        (PLANETS, "D"),
        (PLANETS, "Pluto"),
        (["x"], 0),
        (PLANETS, True),
        (PLANETS, None),
    ],
)
def test_an_answer_that_is_none_of_the_options_is_unusable(choices: Any, answer: Any) -> None:
    sample = {"question": "Which?", "choices": PLANETS, "answer": 0}
    made = reading(None, None, None, [sample], "", True)
    with pytest.raises(Unusable):
        made.read({"question": "Which?", "choices": choices, "answer": answer})


# ---- what others call them, and how they write their answers ----


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages"], "conversations"),
        (["instruction", "input", "output"], "conversations"),
        (["prompt", "completion"], "conversations"),
        (["prompt", "completion", "label"], "conversations"),
        (["prompt", "chosen", "rejected"], "conversations"),
        (["question", "response"], "conversations"),
        (["question", "answer"], "questions"),
        (["QUESTION", "Answer"], "questions"),
        (["id", "problem", "solution"], "questions"),
        (["id", "query", "gold"], "questions"),
        (["data_source", "prompt", "reward_model", "extra_info"], "questions"),
        (["title", "text"], "text"),
        (["prompt"], "nothing"),
        (["a", "b"], "nothing"),
    ],
)
def test_columns_say_what_rows_are_good_for(columns: list[str], kind: str) -> None:
    assert holds(columns) == kind


def test_names_are_known_in_any_case_and_alpacas_input_is_asked_too() -> None:
    assert (read({"QUESTION": "q", "Target": "a"}).question, read({"Query": "q", "gold": 3}).answer) == (
        "q",
        "3",
    )
    alpaca = {"instruction": "Add them.", "input": "3 and 4", "output": "7"}
    assert (read(alpaca).question, read(alpaca).answer) == ("Add them.\n3 and 4", "7")
    assert read({**alpaca, "input": ""}).question == "Add them."


def test_a_row_without_a_marker_does_not_change_how_the_others_are_read() -> None:
    rows = [{"question": f"q{n}", "answer": f"steps\n#### {n}"} for n in range(9)]
    found = reading(None, None, None, [*rows, {"question": "q", "answer": "none"}], "t", True)
    assert [found.read(row).answer for row in rows] == [str(n) for n in range(9)]
    with pytest.raises(Unusable, match="####"):
        found.read({"question": "q", "answer": "none"})


OPTIONS = ["red", "green", "blue", "pink"]


@pytest.mark.parametrize(
    "golds",
    [
        [1, 2, 3, 4], ["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0], ["(A)", "(B)", "(C)", "(D)"], ["a", "b", "c", "d"],
        ["A) red", "B. green", "C: blue", "D pink"], ["RED", "Green", "blue.", "pink"], [["A"], ["B"], ["C"], ["D"]],
        [0, 1, 2, 3], ["0", "1", "2", "3"],
    ],
)  # fmt: skip
def test_an_answer_names_its_option_in_the_ways_of_the_sets_in_use(golds: list[Any]) -> None:
    rows = [{"question": "Which?", "choices": OPTIONS, "answer": gold} for gold in golds]
    found = reading(None, None, None, rows, "t", True)
    assert [found.read(row).answer for row in rows] == ["A", "B", "C", "D"]


def test_options_with_letters_of_their_own_have_one_letter() -> None:
    aqua = {"question": "How much?", "options": ["A)21", "B)21.5", "C)22"], "correct": "C"}  # AQuA-RAT's form
    assert read(aqua, answer="correct").question == "How much?\nA. 21\nB. 21.5\nC. 22"
    assert read({**aqua, "options": ["A. a", "no letter", "C. c"]}, answer="correct").choices[0] == "A. a"
    assert read({"question": "q", "choices": [1, 2, 3], "answer": 2}).answer == "B"
