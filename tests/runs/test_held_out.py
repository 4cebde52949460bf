"""A run's held-out questions in the data it is given: left out, said, counted, shown, and asked again by `eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farthing.evaluate.trained import untrained
from farthing.recipe import validate
from farthing.runs.run import run
from farthing.tasks.mixture import Mixture

TASKS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}}
AROUND = ["{}", "{} Think step by step.", "Hi! **{}**", "### Task\n{}\n### Answer", "Say: «{}»"]


def test_wrapped_questions_of_the_evaluation_are_left_out_of_what_is_taught(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = Mixture(TASKS, 0)
    held = [item.question for item in mixture.held_out(10)]
    others = [item.question for item in mixture.held_out(60) if item.question not in held]
    asked = [around.format(question) for question in held for around in AROUND] + others
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": "42"}] for q in asked]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    sft = {"kind": "sft", "data": [str(path)], "length": 128, "batch_tokens": 256, "steps": 2}
    evaluate = {"tasks": TASKS, "held_out": 10, "max_new_tokens": 4}
    recipe = {"name": "t", "base": str(tiny_model), "stages": [sft], "evaluate": evaluate}
    folder = tmp_path / "run"
    run(validate(recipe), folder)
    said = " ".join("".join(capsys.readouterr()).split())
    done = json.loads((folder / "stages" / "01-sft" / "done.json").read_text())
    assert done["data"]["train"]["examples"] == len(others)
    left_out = done["left_out"]
    assert sum(left_out.values()) == len(held) * len(AROUND) == 50
    assert set(left_out) <= {"it is a held-out question", "it holds a held-out question"}
    assert "50 rows left out (" in said
    assert "held-out question" in (folder / "report.html").read_text()
    (again,) = untrained([(mixture, 10)], [folder], lambda _: None)
    assert [item.question for item in again] == held
    (more,) = untrained([(mixture, 40)], [folder], lambda _: None)
    assert not {item.question for item in more} & set(others)
