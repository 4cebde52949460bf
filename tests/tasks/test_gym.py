"""Which generators are taken, under which scorer, and what an item is."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from farthing.base.errors import UserError
from farthing.tasks.extract import plain_form
from farthing.tasks.gym import REFUSED, SCORERS, load_task, reasoning_gym
from farthing.tasks.item import CONVENTIONS
from farthing.tasks.verify import verify

ProceduralDataset = reasoning_gym("reasoning_gym.dataset").ProceduralDataset
DATASETS = reasoning_gym("reasoning_gym.factory").DATASETS
create_dataset = reasoning_gym("reasoning_gym.factory").create_dataset
COMPILED = importlib.util.find_spec("pycosat") is not None


def test_every_generator_is_either_scored_or_refused() -> None:
    assert set(SCORERS) | set(REFUSED) == set(DATASETS)
    assert not set(SCORERS) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_gold_answers_are_right_or_the_generator_is_refused_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("reasoning-gym's scorer was called")

    for cls in (DATASETS[name][0], ProceduralDataset):
        monkeypatch.setattr(cls, "score_answer", never)
    if name in REFUSED:
        with pytest.raises(UserError, match=f"{name} cannot be used because .{{15,}}"):
            load_task(name)
        return
    if name == "zebra_puzzles" and not COMPILED:
        pytest.skip("pycosat, which has to be compiled, is not installed")
    task = load_task(name)
    for index in range(3):
        item = task.item(20, index)
        for convention in CONVENTIONS:
            assert verify(item, plain_form(item.answer, convention), convention).outcome == "right", item


@pytest.mark.parametrize(
    "name", ["chain_sum", "gsm_symbolic", "countdown", "calendar_arithmetic", "figlet_font"]
)
def test_an_item_is_the_generators_own_whatever_was_asked_before(name: str) -> None:
    there = create_dataset(name, seed=5, size=50)
    task = load_task(name)
    for index in (40, 3, 0, 40):
        item = task.item(5, index)
        assert (item.question, item.answer) == (there[index]["question"], there[index]["answer"])
        assert (item.task, item.seed, item.index) == (name, 5, index)
        json.dumps(dict(item.metadata))


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic"])
def test_any_index_works_and_many_seeds_do_not_disturb_each_other(name: str) -> None:
    task = load_task(name)
    first = task.item(1, 100_000)
    for seed in range(20):
        task.item(seed, seed)
    assert task.item(1, 100_000) == first
    assert load_task(name).item(1, 100_000) == first


def test_items_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from farthing.tasks.gym import load_task\n"
        "for name in ('gsm_symbolic', 'family_relationships', 'letter_counting', 'course_schedule'):\n"
        "    task = load_task(name)\n"
        "    print([(task.item(3, i).question, task.item(3, i).answer) for i in range(20)])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_config_reaches_the_generator() -> None:
    task = load_task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert all(len(task.item(0, index).answer.lstrip("-")) <= 2 for index in range(30))


def test_puzzles_carry_what_their_scorer_needs() -> None:
    item = load_task("countdown").item(0, 0)
    assert item.metadata["scorer"] == "expression"
    assert str(item.metadata["target"]) in item.question
    assert all(str(number) in item.question for number in item.metadata["numbers"])
    assert load_task("puzzle24").item(0, 0).metadata["target"] == 24


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_summ", {}, "no reasoning-gym generator 'chain_summ'; the nearest are chain_sum"),
        ("zzzzzzzz", {}, "no reasoning-gym generator 'zzzzzzzz'; try "),
        ("n_queens", {}, "n_queens cannot be used because its questions have more than one right answer"),
        ("chain_sum", {"min_term": 2}, "chain_sum has no setting 'min_term'; did you mean min_terms"),
        ("chain_sum", {"seed": 2}, "chain_sum: seed is set by Farthing"),
        ("chain_sum", {"min_terms": 0}, "chain_sum does not accept its config"),
        ("chain_sum", {"min_terms": "many"}, "chain_sum does not accept its config"),
        ("countdown", {"max_target": 100, "max_value": 1}, "countdown cannot make item 0"),
    ],
)
def test_mistakes_are_named(name: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(name, config)


def test_generators_keep_stdout_clean(capfd: pytest.CaptureFixture[str]) -> None:
    for name in SCORERS:
        if name != "zebra_puzzles" or COMPILED:
            load_task(name)
    assert capfd.readouterr().out == ""
