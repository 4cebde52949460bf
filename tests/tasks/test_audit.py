"""The battery: it passes on our verifiers and fails on careless ones."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.tasks.audit import audit, paid
from farthing.tasks.gym import load_task
from farthing.tasks.item import CONVENTIONS, Convention, Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool

# Verifiers with the holes that published ones had.
CARELESS = """
    import re, time
    from farthing.tasks.item import Verdict

    def _first(text):
        return (re.findall(r"-?[0-9]+", text) or [None])[0]

    def containing(item, text, convention):
        return Verdict("right" if item.answer in text else "wrong", text[:9])

    def evaluating(item, text, convention):
        found = re.search("<answer>(.*?)</answer>", text)
        if found and "**9" not in found[1]:
            try:
                return Verdict("right" if str(eval(found[1])) == item.answer else "wrong", found[1][:9])
            except Exception:
                pass
        return Verdict("unparsed")

    def generous(item, text, convention):
        return Verdict("right", "")

    def strict(item, text, convention):
        return Verdict("wrong", "")

    def hanging(item, text, convention):
        if "**9" in text:
            time.sleep(60)
        return Verdict("wrong", "")
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool() as pool:
        yield pool


def failed(result: dict[str, Any]) -> set[str]:
    assert result["passed"] == all(case["passed"] for case in result["cases"])
    return {case["case"] for case in result["cases"] if not case["passed"]}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_our_verifiers_pass(pool: VerifierPool, convention: Convention) -> None:
    names = (
        "chain_sum",
        "gcd",
        "circuit_logic",
        "countdown",
        "calendar_arithmetic",
        "spell_backward",
        "syllogism",
    )
    result = audit({name: load_task(name) for name in names}, convention, pool)
    assert not failed(result)
    assert {case["task"] for case in result["cases"]} == set(names)
    assert result["seconds"] < 10
    json.dumps(result)


def test_a_mixture_is_audited_with_its_configs(pool: VerifierPool) -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    result = audit(Mixture({"chain_sum": {"weight": 1, "config": tiny}}, seed=0), "final", pool)
    assert not failed(result)
    control = next(case for case in result["cases"] if case["case"] == "control")
    assert set(control) == {"case", "task", "expected", "outcome", "passed", "seconds"}
    assert (control["expected"], control["outcome"], control["passed"]) == ("paid", "right", True)
    assert sum(case["expected"] == "unpaid" for case in result["cases"]) == len(result["cases"]) - 1


@pytest.mark.parametrize(
    ("verifier", "caught"),
    [
        ("containing", {"every answer at once", "repeated answers", "text after the answer", "either or"}),
        ("evaluating", {"code", "power of one", "floor division", "text after the answer"}),
        ("generous", {"empty", "garbage", "another item's answer", "echo of the question", "look-alikes"}),
        ("strict", {"control"}),
        ("hanging", {"tower of powers", "tower beside the answer", "control"}),
    ],
)
def test_careless_verifiers_are_caught(
    verifier: str, caught: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "careless_verifiers.py").write_text(textwrap.dedent(CARELESS))
    monkeypatch.syspath_prepend(str(tmp_path))
    limit = 0.3 if verifier == "hanging" else 60  # the others never reach it, however busy the machine
    with VerifierPool(timeout=limit, function=f"careless_verifiers.{verifier}") as pool:
        result = audit({"chain_sum": load_task("chain_sum")}, "tag", pool)
    assert caught <= failed(result)
    if verifier == "evaluating":
        assert {case["outcome"] for case in result["cases"] if case["case"] == "code"} == {"ran code"}
    if verifier == "hanging":
        assert {case["outcome"] for case in result["cases"] if case["case"] == "tower of powers"} == {
            "timeout"
        }


def test_a_task_with_one_answer_is_refused(pool: VerifierPool) -> None:
    impossible = load_task("binary_alternation", {"p_solvable": 0.0})
    with pytest.raises(UserError, match="binary_alternation gave the answer '-1' to 200 questions in a row"):
        audit({"binary_alternation": impossible}, "final", pool)


# ---- rewards by name, and of one's own ----

ROWS = [
    ("What is 3 + 4?", "7", "B"), ("What is 9 - 4?", "5", "A"), ("What is 2 * 8?", "16", "C"),
    ("What is 1 + 1?", "2", "A"), ("What is 8 / 2?", "4", "B"), ("What is 10 - 1?", "9", "C"),
]  # fmt: skip


class Asked:
    """A task from data, with one reward."""

    def __init__(self, use: str, column: int = 1, **settings: Any) -> None:
        self.name = "mine"
        self.part = {"use": use, "weight": 1.0, "settings": settings}
        self.column = column

    def item(self, seed: int, index: int) -> Item:
        row = ROWS[index % len(ROWS)]
        facts = {"scorer": "rewards", "rewards": [self.part], "row": {"test_list": ["assert f(2) == 4"]}}
        choices = {"choices": ["Rome", "Paris", "Oslo"]} if self.column == 2 else {}
        return Item(
            "mine", seed, index, row[0], row[self.column] if self.column else "", {**facts, **choices}
        )


def audited(pool: VerifierPool, asked: Asked, convention: Convention) -> dict[str, Any]:
    result = audit({"mine": asked}, convention, pool)  # type: ignore[dict-item]
    json.dumps(result)
    return result


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("use", ["number", "exact", "choice", "math", "json"])
def test_verifiers_by_name_pass(pool: VerifierPool, use: str, convention: Convention) -> None:
    if use == "math":
        pytest.importorskip("math_verify")
    if use == "json" and convention != "tag":
        pytest.skip("takes the whole completion, where the attacks have words around an answer")
    settings: dict[str, Any] = {"equal": True} if use == "json" else {}
    result = audited(pool, Asked(use, 2 if use == "choice" else 1, **settings), convention)
    assert not failed(result)
    assert len(result["cases"]) > 20


def test_programs_are_attacked_without_a_gold_answer(pool: VerifierPool) -> None:
    result = audited(pool, Asked("code", 0), "final")
    assert not failed(result)
    assert {"empty", "code", "garbage"} <= {case["case"] for case in result["cases"]}
    assert "control" not in {case["case"] for case in result["cases"]}


def test_models_are_not_asked(pool: VerifierPool) -> None:
    assert audited(pool, Asked("judge", url="http://127.0.0.1:9", model="m"), "final")["cases"] == []


def test_what_a_reward_of_ones_own_pays_for_is_said_and_stops_nothing(
    pool: VerifierPool, tmp_path: Path
) -> None:
    file = tmp_path / "careless.py"
    file.write_text(
        "def contains(answer, completion): return answer in completion\n"
        "def fine(answer, completion): return completion.rpartition('<answer>')[2] == f'{answer}</answer>'\n"
        "def fails(answer, completion): return float(completion)\n"
    )
    result = audited(pool, Asked(f"{file}:contains"), "tag")
    assert result["passed"]
    [line] = paid(result["cases"])
    assert line.startswith(
        "the reward careless.py:contains pays for garbage, nested answers, repeated answers, "
    )
    assert "every answer at once" in line
    fine = audited(pool, Asked(f"{file}:fine"), "tag")
    assert paid(fine["cases"]) == []
    assert not failed(fine)
    [line] = paid(audited(pool, Asked(f"{file}:fails"), "tag")["cases"])
    assert "does not do as it should on control (error), empty (error)" in line
    generous = audited(pool, Asked("regex", 0, pattern="."), "final")
    assert generous["passed"]
    assert "the reward regex pays for white space" in paid(generous["cases"])[0]
