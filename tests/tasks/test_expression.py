"""The parser of arithmetic puzzles, against Python's own arithmetic on expressions we build ourselves."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.expression import evaluate, solves, tidy


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("8/3/2", Fraction(4, 3)),
        ("10-2-3", 5),
        ("-3+5", 2),
        ("2*-3", -6),
        ("-(2-5)", 3),
        (" 7 ", 7),
        ("0", 0),
    ],
)
def test_values(text: str, value: int | Fraction) -> None:
    result = evaluate(text)
    assert result is not None
    assert result[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "3**2", "7//2", "3.2", "3 2", "2(3)", "(2", "2)", "()", "+3", "--3", "1+", "*1", "04", "1e3",
        "x", "9**9**9", "__import__('os')", "1=1", "3,2", "³", "٣", "1" * 13, "(" * 40 + "1" + ")" * 40, "1+"
        * 300 + "1", "1;1", "1 #",
    ],
)  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    assert evaluate(text) is None


def test_division_by_zero_has_no_value() -> None:
    assert evaluate("1/(2-2)") == (None, [1, 2, 2])
    assert solves("1/(2-2)", [1, 2, 2], 1, "+-*/") is False


@pytest.mark.parametrize(
    ("text", "solved"),
    [
        ("4*8-6-2", True),
        ("(8*4)-2-6", True),
        ("4*6", False),  # right value, not every number
        ("4*8-6-2+2-2", False),  # a number more often than given
        ("48-62", False),  # glued digits
        ("4+8+6+2", False),
        ("4**8", None),
    ],
)
def test_every_number_exactly_once(text: str, solved: bool | None) -> None:
    assert solves(text, [4, 8, 6, 2], 24, "+-*/") is solved


def test_only_the_operators_named() -> None:
    assert solves("4*6", [4, 6], 24, "*") is True
    assert solves("4*6", [4, 6], 24, "+-") is False


def test_other_spellings_of_the_operators() -> None:
    assert tidy("3 × 4 ÷ 2 − 1") == "3 * 4 / 2 - 1"
    assert tidy("\\left(3 \\times 4\\right) \\div 2") == "(3 * 4) / 2"
    assert tidy("1" * 501) is None


_TREES = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: _join(*parts)),
    max_leaves=8,
)
_Tree = tuple[str, Fraction | None, list[int]]


def _join(left: _Tree, operator: str, right: _Tree) -> _Tree:
    value = None
    if left[1] is not None and right[1] is not None and not (operator == "/" and right[1] == 0):
        a, b = left[1], right[1]
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[operator]
    return f"({left[0]} {operator} {right[0]})", value, left[2] + right[2]


@given(_TREES)
def test_agrees_with_fractions(tree: _Tree) -> None:
    assert evaluate(tree[0]) == (tree[1], tree[2])


@given(st.text(alphabet="0123456789+-*/(). x²", max_size=40))
def test_never_raises_and_never_has_two_values(text: str) -> None:
    result = evaluate(text)
    if result is not None and result[0] is not None:
        targets = [target for target in range(-50, 50) if solves(text, result[1], target, "+-*/")]
        assert len(targets) <= 1


@given(st.text(max_size=60))
def test_never_raises_on_any_text(text: str) -> None:
    assert evaluate(tidy(text) or "") is None or set(text) & set("0123456789")
