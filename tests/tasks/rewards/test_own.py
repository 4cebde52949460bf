"""Functions of the user's own: three signatures, what they may return, and what is said when they fail."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.tasks.item import Item, Verdict
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.own import _function, _module
from farthing.tasks.verify import verify


@pytest.fixture(autouse=True)
def forgotten() -> None:
    _module.cache_clear()


class Made:
    """A file of rewards, and what its function makes of a completion."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "my_rewards.py"

    def item(self, code: str, settings: dict[str, Any] | None = None, **row: Any) -> Item:
        self.path.write_text(textwrap.dedent(code))
        part = {"use": f"{self.path}:score", "weight": 1.0, "settings": settings or {}}
        return Item("mine", 0, 4, "What is 3 + 4?", "7", {"scorer": "rewards", "rewards": [part], "row": row})

    def verdict(
        self, code: str, text: str = "7", settings: dict[str, Any] | None = None, **row: Any
    ) -> Verdict:
        return verify(self.item(code, settings, **row), text, "final")

    def error(self, code: str, **row: Any) -> str:
        verdict = self.verdict(code, **row)
        assert (verdict.outcome, verdict.score, verdict.parts) == ("error", None, {})
        assert verdict.error
        assert "\n" not in verdict.error
        return verdict.error


@pytest.fixture
def mine(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "def score(question, answer, completion, row): return completion == answer and row['level'] == 2",
        "def score(completion, answer): return completion == answer",
        "def score(completion, *, row, answer): return float(completion == answer and row['level'] == 2)",
        "def score(asked, gold, said, columns): return said == gold and asked.endswith('?')",
        "score = lambda completion, **all: completion == all['answer']",
        "import functools\nscore = functools.partial(lambda a, completion: completion == str(a), 7)",
        "class Score:\n    def __call__(self, completion): return completion == '7'\nscore = Score()",
        "async def score(completion): return completion == '7'",
    ],
)
def test_our_signature(mine: Made, code: str) -> None:
    assert mine.verdict(code, level=2) == Verdict("right", None, 1.0, {"score": 1.0})
    assert mine.verdict(code, "8", level=2) == Verdict("wrong", None, 0.0, {"score": 0.0})


# In the manner of verl's reward_score: by the data's source, the answer after ####.
VERL = """
    import re

    def score(data_source, solution_str, ground_truth, extra_info=None):
        if data_source != "openai/gsm8k":
            raise NotImplementedError(f"no reward for {data_source!r}")
        found = re.findall("#### ([0-9.,-]+)", solution_str)
        right = bool(found) and found[-1].replace(",", "") == ground_truth
        return {"score": 1.0 if right else 0.1 * bool(found), "acc": right, "pred": found[-1:] and found[-1]}
"""


def test_a_function_of_verls(mine: Made) -> None:
    source = {"data_source": "openai/gsm8k"}
    assert mine.verdict(VERL, "So 7.\n#### 7", **source).outcome == "right"
    assert mine.verdict(VERL, "So 8.\n#### 8", **source) == Verdict("wrong", None, 0.1, {"score": 0.1})
    assert "line 6: NotImplementedError: no reward for 'mine' (row 4 of mine)" in mine.error(VERL)


# In the manner of TRL's and open-r1's: batches, messages, columns of the data.
TRL = {
    "texts": """
        def score(completions, answer, **kwargs):
            return [1.0 if text.strip() == gold else 0.0 for text, gold in zip(completions, answer)]
    """,
    "columns": """
        def score(prompts, completions, ground_truth):
            three = zip(prompts, completions, ground_truth)
            return [float(text == gold and "3 + 4" in asked) for asked, text, gold in three]
    """,
    "messages": """
        def score(completions, solution, **kwargs):
            contents = [completion[0]["content"] for completion in completions]
            return [float(content == gold) for content, gold in zip(contents, solution)]
    """,
    "annotated messages": """
        def said(completion):
            return completion[0]["content"]

        def score(prompts, completions: list[list[dict[str, str]]], solution: list[str]) -> list[float | None]:
            assert prompts[0][-1]["role"] == "user"
            return [float(said(completion) == gold) for completion, gold in zip(completions, solution)]
    """,
    "a closure": """
        def made(best):
            def inner(completions, solution, **kwargs):
                return [best * (c[0]['content'] == gold) for c, gold in zip(completions, solution)]
            return inner

        score = made(1.0)
    """,
}


@pytest.mark.parametrize("name", TRL)
def test_a_function_of_trls(mine: Made, name: str) -> None:
    assert mine.verdict(TRL[name]) == Verdict("right", None, 1.0, {"score": 1.0})
    assert mine.verdict(TRL[name], "8").outcome == "wrong"


def test_the_form_of_completions_can_be_said(mine: Made) -> None:
    code = """
        def content(completion):
            return completion[0]["content"]

        def score(completions, **kwargs):
            return [float(content(completion) == "7") for completion in completions]
    """
    assert "TypeError: string indices must be integers" in mine.error(code)
    assert mine.verdict(code, settings={"completions": "messages"}).outcome == "right"


def test_where_the_prompt_is_a_conversation_completions_are_messages_as_in_trl(mine: Made) -> None:
    code = """
        def content(completion):
            return completion[0]["content"]

        def score(prompts, completions, **kwargs):
            return [float(content(c) == "7" and p[0]["role"] == "system") for p, c in zip(prompts, completions)]
    """
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    assert mine.verdict(code, prompt=turns).outcome == "right"


@pytest.mark.parametrize(
    "code",
    [
        "def score(completion): raise KeyboardInterrupt",
        "class Own(BaseException): pass\ndef score(completion): raise Own",
        "class Own(Exception):\n    def __str__(self): raise ValueError\ndef score(completion): raise Own",
    ],
)
def test_whatever_is_raised_is_an_error_of_one_line(mine: Made, code: str) -> None:
    assert mine.error(code).startswith("my_rewards.py, line ")


def test_a_decimal_is_a_number(mine: Made) -> None:
    code = "from decimal import Decimal\ndef score(completion): return Decimal('0.25')"
    assert mine.verdict(code).score == 0.25


def test_no_opinion_is_left_out(mine: Made) -> None:
    for code in (
        "def score(completion): return None",
        "def score(completions, **kwargs): return [None for _ in completions]",
    ):
        asked = mine.item(code)
        asked.metadata["rewards"].append({"use": "number", "weight": 0.5, "settings": {}})
        verdict = verify(asked, "is 7", "final")
        assert (verdict.score, verdict.parts) == (0.5, {"number": 1.0})
        _module.cache_clear()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.25", ("wrong", None, 0.25)),
        ("-3", ("wrong", None, -3.0)),
        ("2", ("right", None, 2.0)),
        ("np.float32(1.0)", ("right", None, 1.0)),
        ("np.array(0.5)", ("wrong", None, 0.5)),
        ("np.True_", ("right", None, 1.0)),
        ("Verdict('unparsed')", ("unparsed", None, 0.0)),
        ("Verdict('right', '7')", ("right", "7", 1.0)),
        ("Verdict('wrong', '8', 0.1)", ("wrong", "8", 0.1)),
        ("{'score': 0.5, 'outcome': 'right', 'answer': 7}", ("right", "7", 0.5)),
    ],
)
def test_what_may_be_returned(mine: Made, value: str, expected: tuple[Any, ...]) -> None:
    code = f"import numpy as np\nfrom farthing.tasks import Verdict\ndef score(completion): return {value}"
    verdict = mine.verdict(code)
    assert (verdict.outcome, verdict.answer, verdict.score) == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return float('nan')", "my_rewards.py: returned nan; a reward is a finite number (row 4 of mine)"),
        ("return float('inf')", "returned inf"),
        ("return '1.0'", "returned '1.0', which is no number"),
        ("return [1.0]", "returned [1.0], which is no number"),
        ("return {'reward': 1}", "returned a table without score"),
        ("return {'score': 1, 'outcome': 'fine'}", "returned the outcome 'fine'"),
        ("return 10 ** 400", "OverflowError"),
        ("return row['level']", "my_rewards.py, line 2: KeyError: 'level' (row 4 of mine)"),
        ("raise ValueError('two\\nlines' + 'x' * 999)", "line 2: ValueError: two linesxxx"),
        ("raise SystemExit(0)", "line 2: SystemExit: 0"),
        ("import json; json.loads('{')", "my_rewards.py, line 2: JSONDecodeError"),
        ("assert False", "line 2: AssertionError"),
        ("return score(completion, row)", "line 2: RecursionError"),
    ],
)
def test_what_fails_is_an_error_with_its_line(mine: Made, body: str, said: str) -> None:
    assert said in mine.error(f"def score(completion, row):\n    {body}")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(a, b): return 1", "score takes (a, b); take (question, answer, completion, row)"),
        ("def score(completion, tokens): return 1", "score takes (completion, tokens); take"),
        ("score = 3", "score is no function"),
        ("import nothing_of_this_name\ndef score(completion): return 1", "line 1: ModuleNotFoundError"),
        ("def score(completion): return 1\n1 / 0", "line 2: ZeroDivisionError"),
        ("def score(completions, **kwargs): return 1.0", "return a list of one reward"),
        ("def score(completions, **kwargs): return [1.0, 2.0]", "returned 2 rewards for one completion"),
        ("def score(completions, **kwargs): return {}", "return a list of one reward"),
    ],
)
def test_a_file_or_function_that_cannot_be_used(mine: Made, code: str, said: str) -> None:
    assert said in mine.error(code)


def test_neighbours_can_be_imported(mine: Made, tmp_path: Path) -> None:
    (tmp_path / "helpers_of_mine.py").write_text("def right(text): return text == '7'\n")
    code = "from helpers_of_mine import right\ndef score(completion): return right(completion)"
    assert mine.verdict(code).outcome == "right"


def test_the_pools_limits_hold(mine: Made) -> None:
    code = """
        import os, time
        print("noise")

        def score(completion):
            print("more noise")
            if completion == "hang":
                while True: pass
            if completion == "hoard":
                return len(bytearray(8 * 2**30))
            if completion == "die":
                os._exit(1)
            return completion == "7"
    """
    asked = mine.item(code, {"seconds": 0.1})
    with VerifierPool(1, timeout=0.5) as pool:
        verdicts = pool.verify([(asked, text) for text in ("7", "hang", "7", "die", "hoard", "8")], "final")
    assert [v.outcome for v in verdicts] == ["right", "timeout", "right", "timeout", "error", "wrong"]
    assert "line 10: MemoryError" in str(verdicts[4].error)


def test_a_slow_import_is_no_answers_time(mine: Made) -> None:
    code = "import time\ntime.sleep(1)\ndef score(completion): return completion == '7'"
    asked = mine.item(code, {"seconds": 0.1})
    with VerifierPool(1, timeout=0.2) as pool:
        assert [v.outcome for v in pool.verify([(asked, "7"), (asked, "8")], "final")] == ["right", "wrong"]


def test_a_file_that_ends_the_process_is_one_sentence(mine: Made) -> None:
    asked = mine.item("import os\nos._exit(1)\ndef score(completion): return 1")
    with (
        VerifierPool(1) as pool,
        pytest.raises(UserError, match=r"^my_rewards.py: importing it ends the process"),
    ):
        pool.verify([(asked, "7")], "final")


def test_a_file_is_imported_once(mine: Made) -> None:
    asked = mine.item("calls = []\ndef score(completion): calls.append(1); return len(calls)")
    assert [verify(asked, "7", "final").score for _ in range(3)] == [1.0, 2.0, 3.0]
    assert _function(str(mine.path), "score")
