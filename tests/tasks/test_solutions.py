"""Worked solutions: every step is true, and every ending is judged right by the task's own verifier."""

import ast
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.gym import load_task
from farthing.tasks.item import CONVENTIONS, Convention, Item
from farthing.tasks.solutions import SOLVABLE, solution_conversation, solution_text, solve
from farthing.tasks.verify import verify

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("chain_sum", {}),
    ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    ("chain_sum", {"allow_negation": True}),
    ("basic_arithmetic", {}),
    ("basic_arithmetic", {"whitespace": "random"}),
    ("basic_arithmetic", {"whitespace": "no_space", "format_style": "natural"}),
    ("products", {}),
    ("products", {"min_digits": 1, "max_digits": 2, "max_terms": 3, "allow_negation": True}),
    ("gcd", {"max_numbers": 4}),
    ("lcm", {"max_numbers": 4}),
    ("simple_equations", {}),
    ("spell_backward", {}),
]
NAMED = [f"{name}-{number}" for number, (name, _) in enumerate(CONFIGS)]


def item(question: str, answer: str, task: str = "chain_sum") -> Item:
    return Item(task, 0, 0, question, answer, {"scorer": "integer"})


OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}  # fmt: skip


def value(expression: str) -> int:
    """An expression's value as Python's own grammar reads it; the module under test has a reader of its own."""

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](of(node.operand))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return of(ast.parse(expression.strip().replace("/", "//"), mode="eval").body)


def check_steps(thinking: str) -> None:
    """Every equals sign in a line has the same value on both sides."""
    for line in thinking.splitlines():
        head, colon, columns = line.partition(": ")
        if colon:
            columns, _, result = columns.rpartition(" = ")
            for step in columns.split():
                left, right = step.split("=")
                assert value(left) == int(right), line
            head = f"{head} = {result}"
        sides = head.replace(" rounded down", "").split(" = ")
        if not any(side.strip("-0123456789*").isalpha() for side in sides):
            assert len(sides) > 1
            assert len({value(side) for side in sides}) == 1, line


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=NAMED)
def test_every_solution_is_right_by_the_tasks_own_verifier(name: str, config: dict[str, Any]) -> None:
    task = load_task(name, config)
    solved = 0
    for index in range(300):
        one = task.item(11, index)
        solution = solve(one)
        if solution is None:
            continue
        solved += 1
        thinking, answer = solution
        assert answer == one.answer
        assert thinking.strip() == thinking != ""
        convention: Convention = CONVENTIONS[index % 3]
        messages = solution_conversation(one, convention)
        assert messages is not None
        assert verify(one, messages[-1]["content"], convention).outcome == "right", messages
        assert verify(one, solution_text(one) or "", "final").outcome == "right"
        if name != "spell_backward":
            check_steps(thinking)
    assert solved >= 299, "simple_equations has one in hundreds that asks nothing: 0 = 0"


def test_all_generators_are_tried_here() -> None:
    assert {name for name, _ in CONFIGS} == set(SOLVABLE)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(-(10**6), 10**6)), min_size=1, max_size=4))
def test_any_expression_is_worked_out(terms: list[tuple[str, int]]) -> None:
    expression = " ".join([str(terms[0][1]), *(f"{sign} {number}" for sign, number in terms[1:]), "- 0"])
    found = solve(item(f"problem: {expression} =", str(value(expression))))
    assert found is not None
    check_steps(found[0])


def test_the_form_of_the_steps() -> None:
    def steps(question: str, answer: str, task: str = "chain_sum") -> str:
        found = solve(item(question, answer, task))
        assert found is not None
        return found[0]

    assert steps("problem: 7 + 8 - 9 =", "6") == "7 + 8 = 15\n15 - 9: 15-9=6 1-0-1=0 = 6"
    assert steps("problem: 4 + 3 - 9 =", "-2") == "4 + 3 = 7\n7 - 9 = -2"
    assert steps("problem: 859 + 67 =", "926") == "859 + 67: 9+7=16 5+6+1=12 8+0+1=9 = 926"
    assert steps("problem: 205 - 838 =", "-633") == "205 - 838 = -(838 - 205): 8-5=3 3-0=3 8-2=6 = -633"
    assert steps("problem: 520 + -265 =", "255") == "520 + -265 = 520 - 265: 10-5=5 12-6-1=5 5-2-1=2 = 255"
    assert steps("Calculate -( 2 + 3 ) * 4.", "-20", "basic_arithmetic") == (
        "2 + 3 = 5\n-5 * 4 = -(5 * 4)\n5 * 4 = 20"
    )
    assert steps("m: 47 * 38. Give", "1786", "products") == (
        "47 * 8: 7*8=56 4*8+5=37 = 376\n47 * 30: 7*3=21 4*3+2=14 = 1410\n"
        "376 + 1410: 6+0=6 7+1=8 3+4=7 0+1=1 = 1786"
    )
    assert (
        steps("numbers: 760, 368. Give", "8", "gcd")
        == "760 = 2 * 368 + 24\n368 = 15 * 24 + 8\n24 = 3 * 8 + 0"
    )
    assert steps("numbers: 60, 100", "300", "lcm").splitlines()[-2:] == [
        "60 / 20 = 3",
        "100 * 3: 0*3=0 0*3=0 1*3=3 = 300",
    ]
    assert steps("Solve for z: 34*z - 90 = 250", "10", "simple_equations") == (
        "250 + 90: 0+0=0 5+9=14 2+0+1=3 = 340\n34*z = 340\n340 / 34 = 10\nz = 10"
    )
    assert (
        steps("Spell this word backward (example: sun -> nus): cat", "tac", "spell_backward")
        == "c a t\nt a c"
    )


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("countdown", "Use 1, 2, 3", "6"),
        ("chain_sum", "problem: 1 + 1 =", "3"),
        ("chain_sum", "problem: 1 + two =", "3"),
        ("basic_arithmetic", "Calculate ( 1 + 2.", "3"),
        ("basic_arithmetic", "Calculate 1 / 0.", "0"),
        ("basic_arithmetic", "Calculate 1 + .", "1"),
        ("basic_arithmetic", "Calculate nothing.", "0"),
        ("basic_arithmetic", "Calculate 105 / 738 - 405.", "-370"),
        ("simple_equations", "Determine the value of i that satisfies: 0 = 0", "83"),
        ("simple_equations", "Solve for z: 3*z = 10", "3"),
    ],
)
def test_what_cannot_be_solved_is_left_alone(task: str, question: str, answer: str) -> None:
    one = item(question, answer, task)
    assert solve(one) is None
    assert solution_text(one) is None
    assert solution_conversation(one) is None


def test_a_conversation_asks_as_the_stage_after_it_will() -> None:
    one = item("problem: 2 + 3 =", "5")
    assert solution_text(one) == "problem: 2 + 3 =\n2 + 3 = 5\nThe answer is 5\n"
    assert solution_conversation(one) == [
        {"role": "user", "content": "problem: 2 + 3 ="},
        {"role": "assistant", "content": "<think>2 + 3 = 5</think>\n\nThe answer is 5"},
    ]
    assert solution_conversation(one, "tag", "Please: {question} {x}", "Think.") == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Please: problem: 2 + 3 = {x}"},
        {"role": "assistant", "content": "<think>2 + 3 = 5</think>\n\n<answer>5</answer>"},
    ]


def test_the_page_about_data_shows_a_solution_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("\n## Worked solutions\n")[1].split("\n## ")[0]
    [shown] = re.findall(r"```text\n(.*?)```", section, flags=re.S)
    question, _, rest = shown.partition("\n")
    assert solution_text(item(question, rest.split()[-1])) == shown
    assert set(re.findall(r"`([a-z_]+)`", section)) == set(SOLVABLE)
