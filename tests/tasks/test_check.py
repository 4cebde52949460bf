"""Mistakes in a recipe's tasks are found without a model and without a network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.recipe import Recipe, builtin, load, validate
from farthing.tasks.check import check

PENS = "".join(json.dumps({"question": f"{n} pens and 2?", "answer": f"{n + 2}"}) + "\n" for n in range(9))


def recipe(tasks: Any, **more: Any) -> Recipe:
    return validate(
        {
            "name": "t",
            "base": "hf:owner/name",
            "stages": [{"kind": "grpo", "steps": 1, "tasks": tasks}],
            **more,
        }
    )


WRONG: dict[str, tuple[Any, str]] = {
    "a name": ({"chain_sun": 1}, r"there is no task 'chain_sun'; the nearest are chain_sum"),
    "a set's name": ({"gsm9k": 1}, r"there is no task 'gsm9k'; the nearest are gsm8k"),
    "nonsense": ({"nonsense": 1}, r"there is no task 'nonsense'; .*\{nonsense: \{path: …\}\}"),
    "a refused generator": ({"sudoku": 1}, r"sudoku cannot be used because its answers are grids"),
    "a setting": ({"chain_sum": {"config": {"max_term": 3}}}, r"no setting 'max_term'; did you mean max_terms\?"),
    "config of a set": ({"gsm8k": {"config": {"a": 1}}}, "config belongs to a generator"),
    "nothing to train on": ({"aime24": 1}, "aime24 is for evaluation only"),
    "a path": ({"mine": {"path": "absent.jsonl"}}, "absent.jsonl does not exist; give a file"),
    "a hub's name": ({"mine": {"path": "hf:alone"}}, "hf:alone names no dataset"),
    "a column": ({"mine": {"path": "pens.jsonl", "question": "frage"}}, "there is no column 'frage'; there are quest"),
    "a marker": (
        {"mine": {"path": "pens.jsonl", "answer": {"column": "answer", "after": "=>"}}},
        r"none of the first 9 rows of \S+pens.jsonl can be used: its answer has no '=>'",
    ),
    "a reward": ({"mine": {"path": "pens.jsonl", "reward": "nummber"}}, "nummber"),
    "a file of rewards": ({"mine": {"path": "pens.jsonl", "reward": "absent.py:score"}}, "absent.py"),
    "a template": ({"mine": {"path": "pens.jsonl", "question": "{question"}}, "names no column; write {column}"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line_that_says_what_is_wrong(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, why = WRONG[what]
    (tmp_path / "pens.jsonl").write_text(PENS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=why) as said:
        check(recipe(tasks))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("base", ["nowhere", "./nowhere", "runs/nowhere", "nowhere.gguf", " "])
def test_a_base_that_is_nowhere_is_said_before_anything_is_looked_for(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    stage = {"kind": "grpo", "steps": 1, "tasks": {"chain_sum": 1}}
    with pytest.raises(UserError, match=r"base: .*give a model folder"):
        check(validate({"name": "t", "base": base, "stages": [stage]}))


@pytest.mark.parametrize("name", [name for name, _ in builtin()])
def test_every_built_in_recipe_passes_without_reading_the_hub(name: str) -> None:
    check(load(name))


def test_what_is_right_passes_without_reading_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "pens.jsonl"
    path.write_text(PENS)
    mine = {"path": str(path), "reward": {"use": "number", "weight": 2}}
    check(recipe({"mine": mine, "chain_sum": 1, "gsm8k": 1, "hub": {"path": "hf:a/b:test"}}))
    check(recipe({"chain_sum": 1}, evaluate={"tasks": {"aime24": 1, "mine": mine}}))


def test_a_source_that_does_not_exist_or_cannot_be_solved(tmp_path: Path) -> None:
    sft = {"kind": "sft", "data": [{"path": str(tmp_path / "absent.jsonl")}]}
    with pytest.raises(UserError, match="does not exist"):
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))
    sft = {"kind": "sft", "data": [{"tasks": {"maze": 1}, "items": 3}]}
    with pytest.raises(UserError, match="maze has no worked solutions"):
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))
    (tmp_path / "pens.jsonl").write_text(PENS)
    sft = {"kind": "sft", "data": [{"tasks": {"mine": {"path": str(tmp_path / "pens.jsonl")}}, "items": 3}]}
    with pytest.raises(
        UserError, match="data: mine has no worked solutions: no text that ends in its answer"
    ):
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        (
            '{"q": 1}\n' * 50,
            {},
            r"has no conversation in its first rows; a\.jsonl:1: the row has no conversation",
        ),
        ('{"text": ""}\n', {}, r"a\.jsonl:1: the text is empty; farthing data FILE shows what is recognised"),
        ('{"prompt": "a", "completion": "b"}\n', {"shape": "alpaca"}, "does not have the shape alpaca"),
        ("", {}, "has no conversation in its first rows; farthing data"),
    ],
)
def test_a_file_without_conversations_is_no_data_to_tune_on(
    rows: str, keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(rows)
    sft = {"kind": "sft", "data": [{"path": str(tmp_path / "a.jsonl"), **keys}]}
    with pytest.raises(UserError, match=said):
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))
    (tmp_path / "a.jsonl").write_text(rows * 3 + '{"instruction": "a", "output": "b"}\n')
    if rows.count("\n") < 20:
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))


def test_a_template_that_does_not_exist_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    sft = {"kind": "sft", "data": [{"path": str(tmp_path / "a.jsonl")}], "chat_template": "./none.jinja"}
    with pytest.raises(UserError, match=r"none\.jinja does not exist; give the path of a template"):
        check(validate({"name": "t", "base": "hf:owner/name", "stages": [sft]}))


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys; from farthing.recipe import validate; from farthing.tasks.check import check; "
        "stage = {'kind': 'grpo', 'steps': 1, 'tasks': {'gsm8k': 1, 'chain_sum': 1}}; "
        "check(validate({'name': 't', 'base': 'hf:owner/name', 'stages': [stage]})); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
