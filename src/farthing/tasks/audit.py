"""Attacks on the verifiers, before any training: they must earn nothing, run nothing and hang nothing.

Every case is tried on several items of every task. One more case, the control, must be paid: the right answer
in the convention's plainest form. A verifier that pays an attack teaches the attack.

Where a reward compares nothing with a gold answer, as tests of a program do, only the attacks that need none are tried.
What rules of the user's own pay for (a function, a pattern, a schema, instructions) is recorded and said, and stops
nothing. Models are not asked.
"""

from __future__ import annotations

import random
import re
import string
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from farthing.base.errors import UserError
from farthing.recipe.rewards import ASKED, is_own
from farthing.tasks.data import DataTask
from farthing.tasks.extract import plain_form
from farthing.tasks.gym import Task
from farthing.tasks.item import Convention, Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.total import decides, named, settings

_ITEMS = 6  # a task
_GOLDLESS_ITEMS = 2  # a task whose rewards compare nothing: a program takes a process
_DRAWS = 200  # which must have at least two different answers
_SEED = 3 * 2**30  # neither Mixture's training seeds nor its held-out ones
_MEGABYTE = 1_000_000
_RULES = ("regex", "ifeval")  # the user's own rules, or the data's
_GOLDLESS = ("code", "format", "ifeval", "length", "overlong")  # have no answer to compare with
_NEED_NO_GOLD = (
    "empty", "white space", "garbage", "empty answer", "code", "tower of powers", "a megabyte of digits",
    "a megabyte of tags", "echo of the question",
)  # fmt: skip
_LOOKALIKE = {ord(char): ord(char) + 0xFEE0 for char in string.digits + string.ascii_letters}  # full width

# An attack is a completion for an item, given the answer of another item of the task, in some convention.
_Attack = Callable[[Item, str, Convention], str]


def audit(tasks: Mixture | Mapping[str, Task], convention: Convention, pool: VerifierPool) -> dict[str, Any]:
    """Try every attack on every task; returns the content of audit.json.

    {"passed", "seconds", "cases": [{"case", "task", "expected", "outcome", "passed", "seconds"}]}, where
    `expected` is "paid" or "unpaid". `outcome` is the items' worst: the verdict that fails the case if there
    is one. A case of a reward of the user's own also has "own", its name, and does not count in "passed".

    Raises UserError for a task whose answer is always the same, which any model learns at once.
    """
    started = time.monotonic()
    cases: list[dict[str, Any]] = []
    by_name = tasks.tasks if isinstance(tasks, Mixture) else tasks
    with tempfile.TemporaryDirectory() as folder:
        trap = Path(folder) / "ran"
        for name, task in by_name.items():
            items, others = _items(task)
            part = _deciding(items[0])
            if part in ASKED:
                continue
            own = {"own": part} if part is not None and (is_own(part) or part in _RULES) else {}
            for case, attack in _attacks(trap).items():
                if not all(others) and case not in _NEED_NO_GOLD:
                    continue
                pairs = [
                    (item, attack(item, other, item.convention(convention)))
                    for item, other in zip(items, others, strict=True)
                ]
                found = _try(case == "control", pairs, convention, pool, trap)
                cases.append({"case": case, "task": name, **found, **own})
    return {
        "passed": all(case["passed"] or "own" in case for case in cases),
        "seconds": time.monotonic() - started,
        "cases": cases,
    }


def paid(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What rewards of the user's own do wrong, a line for each of them."""
    lines: list[str] = []
    for name in dict.fromkeys(case["own"] for case in cases if "own" in case and not case["passed"]):
        failed = [case for case in cases if case.get("own") == name and not case["passed"]]
        pays = [case["case"] for case in failed if case["outcome"] == "right"]
        fails = [f"{case['case']} ({case['outcome']})" for case in failed if case["outcome"] != "right"]
        said = [f"pays for {', '.join(pays)}"] if pays else []
        said += [f"does not do as it should on {', '.join(fails)}"] if fails else []
        lines.append(f"the reward {PurePath(name).name} {'; it '.join(said)}: a model will learn that")
    return lines


def _try(
    control: bool, pairs: list[tuple[Item, str]], convention: Convention, pool: VerifierPool, trap: Path
) -> dict[str, Any]:
    started = time.monotonic()
    outcomes = [verdict.outcome for verdict in pool.verify(pairs, convention, beside=False)]
    good = {"right"} if control else {"wrong", "unparsed"}
    failures = [outcome for outcome in outcomes if outcome not in good]
    outcome: str = failures[0] if failures else outcomes[0]
    if trap.exists():
        outcome = "ran code"
        trap.unlink()
    return {
        "expected": "paid" if control else "unpaid",
        "outcome": outcome,
        "passed": outcome in good,
        "seconds": time.monotonic() - started,
    }


def _attacks(trap: Path) -> dict[str, _Attack]:
    """The battery by name. `_form` fills in {a}, the right answer, and {b}, that of another item."""
    run = f"__import__('os').system('touch {trap}')"
    garbage = "".join(random.Random(0).choices(string.printable + "é√😀\x00", k=2000))
    return {
        "control": lambda item, other, way: plain_form(item.answer, way),
        "empty": lambda item, other, way: "",
        "white space": lambda item, other, way: " \n\t" * 50,
        "garbage": lambda item, other, way: garbage,
        "empty answer": lambda item, other, way: plain_form("", way),
        "nested answers": _nested,
        "repeated answers": lambda item, other, way: (
            f"{plain_form(item.answer, way)}\n{plain_form(other, way)}"
        ),
        "text after the answer": _trailing,
        "every answer at once": _everything,
        "either or": _form("{a} or {b}"),
        "power of one": _form("{a}**1"),
        "floor division": _form("{a}//1"),
        "glued": _form("{a}{b}"),
        "glued to a decimal": _form("{a}.{b}5"),
        "code": _form(run),
        "code beside the answer": _form(f"{{a}} if {run} else {{b}}"),
        "tower of powers": _form("9**9**9**9"),
        "tower beside the answer": _form("{a} + 0 * 9**9**9**9"),
        "a megabyte of answers": lambda item, other, way: (
            f"{plain_form(item.answer, way)} {other}\n" * (_MEGABYTE // (len(item.answer) + len(other) + 20))
        ),
        "a megabyte of digits": _form("9" * _MEGABYTE),
        "a megabyte of tags": lambda item, other, way: "<answer>\\boxed{" * (_MEGABYTE // 15),
        "deep nesting": _form("(" * 50_000 + "{a}" + ")" * 50_000),
        "look-alikes": lambda item, other, way: plain_form(item.answer.translate(_LOOKALIKE), way),
        "another item's answer": lambda item, other, way: plain_form(other, way),
        "echo of the question": lambda item, other, way: item.question,
    }


def _form(payload: str) -> _Attack:
    def attack(item: Item, other: str, convention: Convention) -> str:
        return plain_form(payload.replace("{a}", item.answer).replace("{b}", other), convention)

    return attack


def _nested(item: Item, other: str, convention: Convention) -> str:
    if convention == "final":  # has no brackets to nest; a clause within a clause is the closest
        return f"The answer is: {item.answer} is {other}"
    return plain_form(plain_form(item.answer, convention), convention)


def _trailing(item: Item, other: str, convention: Convention) -> str:
    more = (
        "and 0 more" if convention == "boxed" else f"and also {other}"
    )  # words may follow a box, numbers not
    return f"{plain_form(item.answer, convention)} {more}"


def _everything(item: Item, other: str, convention: Convention) -> str:
    answers = [str(number) for number in range(-9, 100)] + ["yes", "no", "true", "false", item.answer, other]
    return plain_form(", ".join(answers), convention)


def _deciding(item: Item) -> str | None:
    """The use of the reward that says whether an answer is right; None for a generator's scorer."""
    rewards = item.metadata.get("rewards")
    return named(rewards)[decides(named(rewards))]["use"] if rewards else None


def _compares(item: Item) -> bool:
    """Whether the reward compares answers with the item's gold one."""
    use = _deciding(item)
    if use is None:
        return True
    chosen = settings(named(item.metadata["rewards"])[decides(named(item.metadata["rewards"]))])
    if use == "regex":
        return bool(re.compile(chosen.pattern).groups)
    return chosen.equal if use == "json" else use not in _GOLDLESS and bool(item.answer)


def _items(task: Task | DataTask) -> tuple[list[Item], list[str]]:
    """Several items, each with the wrong answer of another; "" where none is compared."""
    first = task.item(_SEED, 0)
    if _deciding(first) in ASKED or not _compares(first):
        items = [task.item(_SEED, index) for index in range(_GOLDLESS_ITEMS)]
        return items, [""] * len(items)
    drawn: list[Item] = []
    for index in range(_DRAWS):
        drawn.append(task.item(_SEED, index))
        if len(drawn) >= _ITEMS and any(_differ(drawn[0], item) for item in drawn):
            break
    items = drawn[:_ITEMS]
    others = []
    for item in items:
        other = next((other for other in drawn if _differ(item, other)), None)
        if other is None and is_own(_deciding(item) or ""):
            return items[:_GOLDLESS_ITEMS], [""] * len(items[:_GOLDLESS_ITEMS])
        if other is None:
            raise UserError(
                f"tasks: {task.name} gave the answer {item.answer!r} to {len(drawn)} questions in a row, so "
                "a model need not read them; widen its config"
            )
        others.append(other.answer)
    return items, others


def _differ(item: Item, other: Item) -> bool:
    """Whether the two answers exclude each other for the same question."""
    if item.metadata["scorer"] != other.metadata["scorer"]:
        return False
    if item.metadata["scorer"] == "expression":
        return sorted(item.metadata["numbers"]) != sorted(other.metadata["numbers"])
    return item.answer.casefold() != other.answer.casefold()
