"""The battery: it passes on our verifiers and fails on careless ones."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.tasks.audit import audit
from farthing.tasks.gym import load_task
from farthing.tasks.item import CONVENTIONS, Convention
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
