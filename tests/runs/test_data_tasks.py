"""Runs on questions of one's own: their files are hashed, and what trained is known afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.base.files import sha256
from farthing.evaluate.trained import trained_questions
from farthing.recipe import Recipe, dump, load, validate
from farthing.runs import run
from farthing.runs.attacks import verdict
from farthing.runs.folder import data_files
from farthing.tasks.mixture import Mixture, question_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, start in (("train", 0), ("test", 100), ("examples", 200)):
        rows = [{"question": f"{n} pens and 2 more?", "answer": n + 2} for n in range(start, start + 50)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(folder: Path, **evaluate: Any) -> Recipe:
    mine = {"path": str(folder / "train.jsonl"), "shots": 2, "shots_path": str(folder / "examples.jsonl")}
    stage = {"kind": "grpo", "steps": 2, "prompts": 5, "tasks": {"mine": mine}}
    return validate({"name": "t", "base": str(folder / "none"), "stages": [stage], "evaluate": evaluate})


def test_every_file_that_tasks_read_is_hashed(folder: Path) -> None:
    found = data_files(recipe(folder, tasks={"test": {"path": str(folder / "test.jsonl")}}))
    assert found == {
        str(folder / f"{name}.jsonl"): {f"{name}.jsonl": sha256(folder / f"{name}.jsonl")}
        for name in ("train", "examples", "test")
    }


@pytest.mark.parametrize("own", [False, True])
def test_the_questions_that_trained_are_known(folder: Path, own: bool) -> None:
    evaluate = {"tasks": {"test": {"path": str(folder / "test.jsonl")}}} if own else {}
    made = recipe(folder, held_out=7, **evaluate)
    run_dir = folder / "run"
    stage = run_dir / "stages" / "01-grpo"
    stage.mkdir(parents=True)
    (run_dir / "ledger.jsonl").touch()
    (run_dir / "recipe.yaml").write_text(dump(made))
    (stage / "metrics.jsonl").write_text('{"step": 2, "cursor": 10}\n')
    mixture = Mixture(made.stages[0].asks.tasks, 0)
    drawn = {question_key(mixture.train(index).question) for index in range(10)}
    held = {question_key(item.question) for item in Mixture(made.evaluation_tasks(), 0).held_out(7)}
    lineage = [{"source": name, "sha256": digests} for name, digests in data_files(made).items()]
    (run_dir / "lineage.json").write_text(json.dumps({"base": None, "data": lineage}))
    said: list[str] = []
    assert trained_questions(run_dir, said.append) == drawn - held
    assert (len(drawn), said) == (10, [])

    train = folder / "train.jsonl"
    train.write_text(train.read_text() + '{"question": "A new one?", "answer": "1"}\n')
    assert len(trained_questions(run_dir, said.append)) == 51
    assert (
        said.pop()
        == f"{train} has changed since {run_dir} trained on it, so all its questions count as trained on"
    )
    train.unlink()
    assert trained_questions(run_dir, said.append) == set()
    assert "train.jsonl does not exist" in said.pop()


def test_a_mistake_in_a_task_leaves_no_run_directory_behind(folder: Path) -> None:
    stage = {"kind": "grpo", "steps": 1, "tasks": {"nonsense": 1}}
    with pytest.raises(UserError, match="there is no task 'nonsense'"):
        run({"name": "t", "base": str(folder), "stages": [stage]}, folder / "run", quiet=True)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (
            {"held_out": 30, "subset": 20, "every": 1},
            r"mine: of the 50 questions .* lower held_out or subset",
        ),
        (
            {"held_out": 50, "subset": 5, "every": 1},
            r"^evaluate: subset: tasks: mine: every question .* lower held_out",
        ),
    ],
)
def test_too_few_questions_are_said_with_their_keys_before_anything_is_asked(
    folder: Path, tiny_model: Path, evaluate: dict[str, int], said: str
) -> None:
    made = recipe(folder, **evaluate).model_copy(update={"base": str(tiny_model)})
    with pytest.raises(UserError, match=said):
        run(made, folder / "run", quiet=True)
    assert not (folder / "run" / "evaluations").exists()
    assert not (folder / "run" / "audit.json").exists()


def test_the_audits_sentence_does_not_deny_its_warning(folder: Path) -> None:
    good = {"case": "empty", "passed": True, "outcome": "wrong"}
    bad = {"case": "empty", "passed": False, "outcome": "right", "own": "mine.py:score"}
    assert verdict({"cases": [good, good]}, folder).endswith(
        "2 cases, none of which earned a reward, ran code or hung"
    )
    assert verdict({"cases": [good, bad]}, folder).endswith(
        "2 cases, 1 of which went wrong in rewards of your own"
    )


def test_the_recipe_gsm8k_runs_whole_on_a_file_in_the_hubs_place(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": f"{n}+2=", "answer": f"{n}+2=<<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"}
        for n in range(1, 90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = load(
        "gsm8k",
        [
            f"base={tiny_model}",
            f"stages.sft.data.1.tasks.gsm8k.path={path}",
            f"stages.grpo.tasks.gsm8k.path={path}",
            "stages.sft.data.1.items=60",
            "stages.sft.batch_tokens=512",
            "stages.grpo.steps=1",
            "stages.grpo.max_new_tokens=8",
            "evaluate.held_out=9",
        ],
    )
    run(made, tmp_path / "run", quiet=True)
    [taught] = (tmp_path / "run" / "stages" / "01-sft" / "data").glob("*.jsonl")
    lessons = [json.loads(line) for line in taught.read_text().splitlines()]
    after = (tmp_path / "run" / "evaluations" / "after.jsonl").read_text()
    asked = [json.loads(line) for line in after.splitlines()]
    assert (len(lessons), len(asked)) == (60, 9)
    assert "not used" not in capsys.readouterr().err
    assert not {row["question"] for row in lessons} & {row["question"] for row in asked}
