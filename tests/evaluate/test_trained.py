"""What a run's model was trained on is not asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farthing.data.words import question_key
from farthing.evaluate.trained import before, trained_questions, untrained
from farthing.recipe import Recipe, dump, validate
from farthing.tasks.mixture import Mixture

DIGITS = {"weight": 1, "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def finished(folder: Path, stage: dict[str, Any], **keys: Any) -> Recipe:
    """What a run of one stage leaves in its folder, so far as it matters here."""
    made = validate({"name": "r", "base": "somewhere", "seed": 3, "stages": [stage], **keys})
    (folder / "stages" / f"01-{stage['kind']}" / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(made))
    (folder / "ledger.jsonl").touch()
    return made


def test_what_a_run_trained_on_is_never_asked_of_its_model(tmp_path: Path) -> None:
    recipe = validate(
        {
            "name": "r",
            "base": "somewhere",
            "seed": 3,
            "stages": [{"kind": "grpo", "tasks": {"chain_sum": DIGITS}, "steps": 1}],
            "evaluate": {"held_out": 20},
        }
    )
    stage = tmp_path / "stages" / "01-grpo"
    (stage / "model").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    (tmp_path / "ledger.jsonl").touch()
    (stage / "metrics.jsonl").write_text('{"step": 1, "cursor": 5}\n{"step": 2, "cursor": 40}\n')
    mixture = Mixture({"chain_sum": DIGITS}, 3)
    own = {question_key(item.question) for item in mixture.held_out(20)}
    trained = {question_key(mixture.train(index).question) for index in range(40)} - own
    for source in (tmp_path, stage / "model"):
        assert trained_questions(source) == trained
    assert not trained & {question_key(item.question) for item in mixture.held_out(60, trained)}
    assert trained & {
        question_key(item.question) for item in mixture.held_out(60)
    }  # or the test proves nothing
    assert mixture.held_out(20, trained) == mixture.held_out(20)
    assert trained_questions(tmp_path.parent) == set()


def test_what_the_run_of_the_base_trained_on_is_not_held_out(tmp_path: Path) -> None:
    grpo = {"kind": "grpo", "tasks": {"chain_sum": DIGITS}, "steps": 1}
    finished(tmp_path / "first", grpo, evaluate={"held_out": 20})
    (tmp_path / "first" / "stages" / "01-grpo" / "metrics.jsonl").write_text('{"step": 2, "cursor": 40}\n')
    trained = trained_questions(tmp_path / "first")
    keys: dict[str, Any] = {"base": str(tmp_path / "first"), "evaluate": {"held_out": 60}}
    second = finished(tmp_path / "second", grpo, **keys)
    assert before(second) == trained
    assert trained
    assert trained_questions(tmp_path / "second") == trained
    (tmp_path / "second" / "stages" / "01-grpo" / "metrics.jsonl").write_text('{"step": 2, "cursor": 90}\n')
    held = {
        question_key(item.question) for item in Mixture({"chain_sum": DIGITS}, 3).held_out(60, before(second))
    }
    assert trained_questions(tmp_path / "second") > trained
    assert not trained_questions(tmp_path / "second") & held


def test_questions_in_the_data_of_a_run_are_not_asked_however_they_are_wrapped(tmp_path: Path) -> None:
    mixture = Mixture({"chain_sum": DIGITS}, 3)
    first = [item.question for item in mixture.held_out(12)]
    rows = [
        {"messages": [{"role": "user", "content": f"Please help me!\n{question} Think step by step."}]}
        for question in first[:5]
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    finished(tmp_path / "run", {"kind": "sft", "data": [str(path)]})
    (found,) = untrained([(mixture, 12)], [tmp_path / "run"], said.append)
    asked = {item.question for item in found}
    assert len(asked) == 12
    assert not asked & set(first[:5])
    assert set(first[5:]) <= asked
    path.unlink()
    assert untrained([(mixture, 12)], [tmp_path / "run"], said.append) == [mixture.held_out(12)]
    assert len(said) == 1
    assert said[0].startswith("what was trained on cannot be read any more")
    assert untrained([(mixture, 12)], [tmp_path], said.append) == [mixture.held_out(12)]


def test_rows_that_a_run_left_out_do_not_count(tmp_path: Path) -> None:
    """A run's own held-out questions are asked again, though its data had some of them."""
    mixture = Mixture({"chain_sum": DIGITS}, 3)
    own = [item.question for item in mixture.held_out(12)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"So: {question} Well?"}) + "\n" for question in own))
    evaluate = {"tasks": {"chain_sum": DIGITS}, "held_out": 12}
    finished(tmp_path / "run", {"kind": "sft", "data": [str(path)]}, evaluate=evaluate)
    (found,) = untrained([(mixture, 12)], [tmp_path / "run"], lambda _: None)
    assert {item.question for item in found} == set(own)
