"""Programs as answers: three kinds of tests, and programs that try to pass without solving."""

import json
import sys
from typing import Any

import pytest

from farthing.tasks.item import Item
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards import code
from farthing.tasks.verify import verify

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

# In the manner of HumanEval, MBPP and APPS, in words of our own.
HUMANEVAL = {
    "prompt": 'from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n    """The largest number."""\n',
    "entry_point": "largest",
    "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-5]) == -5\n",
}
MBPP = {
    "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1)"],
    "test_setup_code": "import math",
}
APPS = {"input_output": json.dumps({"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]})}


def item(row: dict[str, Any], **settings: Any) -> Item:
    rewards = [{"use": "code", "weight": 1.0, "settings": {"seconds": 20, **settings}}]
    return Item("mine", 0, 0, "Write it.", "", {"scorer": "rewards", "rewards": rewards, "row": row})


def outcome(row: dict[str, Any], text: str, **settings: Any) -> str:
    return verify(item(row, **settings), text, "final").outcome


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        (HUMANEVAL, "    return max(numbers)\n", "right"),
        (HUMANEVAL, "    return min(numbers)\n", "wrong"),
        (
            HUMANEVAL,
            "Here:\n```python\ndef largest(numbers: List[int]) -> int:\n    return max(numbers)\n```\nIt works.",
            "right",
        ),
        (HUMANEVAL, "```\ndef biggest(n): return max(n)\n\ndef largest(n): return biggest(n)\n```", "right"),
        (
            HUMANEVAL,
            "```python\ndef largest(n): return 3\n```\nNo:\n```python\ndef largest(n): return max(n)\n```",
            "right",
        ),
        (MBPP, "def double(x):\n    return 2 * x\n", "right"),
        (MBPP, "```python\ndouble = lambda x: math.prod([2, x])\n```", "right"),
        (MBPP, "def double(x):\n    return x ** 2\n", "wrong"),
        (MBPP, "It is easy to double.", "wrong"),
        (MBPP, "", "unparsed"),
        (APPS, "a, b = map(int, input().split())\nprint(a + b)", "right"),
        (
            APPS,
            "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), '\\n')",
            "right",
        ),
        (APPS, "print(3)", "wrong"),
        ({}, "print(3)", "bad_gold"),
    ],
)
def test_programs(row: dict[str, Any], text: str, expected: str) -> None:
    assert outcome(row, text) == expected


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('passed')\nraise KeyboardInterrupt",
        "import builtins; builtins.exec = lambda *a: None; exit()",
        "check = lambda c: None",
    ],
)
def test_ending_early_passes_nothing(program: str) -> None:
    assert outcome(HUMANEVAL, f"```python\n{program}\n```") == "wrong"


def test_other_columns() -> None:
    adds = "print(sum(map(int, input().split())))"
    assert outcome({"checks": [{"input": "1 2", "output": 3}]}, adds, tests="checks") == "right"
    assert outcome({"checks": [{"input": "1 2", "output": 4}]}, adds, tests="checks") == "wrong"
    assert outcome(APPS, "import os\nprint(sum(map(int, open(0).read().split())))") == "right"
    assert outcome(APPS, "import os\nprint(sum(map(int, os.read(0, 99).split())))") == "right"
    assert outcome({"checks": "assert x == 3"}, "x = 3", tests="checks") == "right"
    assert code.tests_of({"input_output": '{"inputs": [1], "outputs": []}'}, None) is None
    assert code.tests_of({"input_output": "{"}, None) is None


def test_what_is_the_program() -> None:
    assert code.program_of("<think>```python\nx\n```</think>y", "final") == "y"
    assert code.program_of("<think>x</think><answer>y</answer>", "tag") == "y"
    assert code.program_of("<answer>y</answer><answer>z</answer>", "tag") == ""
    assert code.program_of("```py\ny", "final") == "y"


def test_in_the_pool_a_hanging_program_costs_one_verdict() -> None:
    quick, right = item(MBPP, seconds=1), item(MBPP)
    texts = ["import time; time.sleep(99)", "while True: pass"]
    good = "def double(x): return 2 * x"
    with VerifierPool(1) as pool:
        verdicts = pool.verify([*((quick, text) for text in texts), (right, good)], "final")
    assert [verdict.outcome for verdict in verdicts] == ["wrong", "wrong", "right"]
