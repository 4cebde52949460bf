"""446 answers with our verdicts, math-verify's (0.9.0) and lm-eval's for GSM8K (0.4.13); a difference has its reason.

lm-eval's two columns were made by its own filters and metric: `strict-match`, which reads only what follows "#### ",
and `flexible-extract`, which takes the last number. They are null where the answer is no number.
"""

import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from farthing.tasks.item import Item
from farthing.tasks.verify import verify

ANSWERS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()
]
MATH_VERIFY = "0.9.0"


def installed() -> str | None:
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        return None


def test_our_verdicts_are_those_of_the_table() -> None:
    wrong = []
    for answer in ANSWERS:
        if answer["reader"] == "math" and installed() is None:
            continue
        rewards = [{"use": answer["reader"], "weight": 1.0, "settings": {}}]
        item = Item("table", 0, 0, "", answer["gold"], {"scorer": "rewards", "rewards": rewards, "row": {}})
        outcome = verify(item, answer["text"], answer["convention"]).outcome
        if outcome != answer["ours"]:
            wrong.append((answer["gold"], answer["text"], outcome))
    assert not wrong


@pytest.mark.skipif(installed() != MATH_VERIFY, reason=f"needs math-verify {MATH_VERIFY}")
def test_math_verifys_verdicts_are_those_of_the_table() -> None:
    from math_verify import parse
    from math_verify import verify as same

    wrong = [
        answer
        for answer in ANSWERS
        if bool(same(parse(f"${answer['gold']}$"), parse(answer["text"]))) != answer["math_verify"]
    ]
    assert not wrong


def test_every_difference_is_a_decision() -> None:
    assert len(ANSWERS) == len(
        {tuple(a[k] for k in ("reader", "convention", "gold", "text")) for a in ANSWERS}
    )
    for answer in ANSWERS:
        paid = answer["ours"] == "right"
        differs = paid != answer["math_verify"] or answer["lm_eval_flexible"] not in (None, paid)
        assert differs == (answer["reason"] is not None), answer


def test_what_the_documentation_says_of_the_table() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "recipes.md").read_text().split())
    numbers = [a for a in ANSWERS if a["reader"] == "number"]
    ours = Counter((a["ours"] == "right", a["math_verify"]) for a in ANSWERS)
    flexible = Counter((a["ours"] == "right", a["lm_eval_flexible"]) for a in numbers)
    assert f"{len(ANSWERS)} answers" in page
    assert (
        f"math-verify pays {ours[False, True]} that ours do not, and ours {ours[True, False]} that it does not"
        in page
    )
    assert f"of {len(numbers)} numbers, {flexible[False, True]} and {flexible[True, False]}" in page


@pytest.mark.parametrize(
    "answer", ["\\sqrt{4}", "5!", "4!", "4\\pi", "4i", "4x", ">4", "\\frac{4}{x}", "\\log 4", "4_5", "\\pm 4"]
)
def test_a_box_with_another_value_pays_nothing(answer: str) -> None:
    rewards = [{"use": "number", "weight": 1.0, "settings": {}}]
    item = Item("table", 0, 0, "", "4", {"scorer": "rewards", "rewards": rewards, "row": {}})
    assert verify(item, f"\\boxed{{{answer}}}", "boxed").outcome in ("unparsed", "wrong")
    generated = Item("table", 0, 0, "", "4", {"scorer": "integer"})
    assert verify(generated, f"\\boxed{{{answer}}}", "boxed").outcome in ("unparsed", "wrong")
