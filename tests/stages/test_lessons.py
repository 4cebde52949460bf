"""Worked solutions that come with data: taught once each, in the words in which the recipe asks."""

import json
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.overlap import HeldOut
from farthing.recipe import Asks, Source
from farthing.stages.pieces import Pieces
from farthing.stages.sources import source_paths


@pytest.fixture
def pens(tmp_path: Path) -> Path:
    path = tmp_path / "pens.jsonl"
    rows = [
        {
            "question": f"Ada had {n} pens and lost one. How many are left?",
            "answer": f"{n}-1=<<{n}-1={n - 1}>>{n - 1}\n#### {n - 1}",
        }
        for n in range(2, 42)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lessons(path: Path, items: int, name: str = "mine", asks: Asks | None = None, **keys: Any) -> list[Any]:
    source = Source.model_validate({"tasks": {name: {"path": str(path), **keys}}, "items": items})
    held_out = HeldOut(["Ada had 7 pens and lost one. How many are left?"])
    [(_, made)] = source_paths([source], Pieces(path.parent / "stage", print, 0), 0, held_out, asks)
    return [json.loads(line) for line in Path(made).read_text().splitlines()]


def test_each_row_is_taught_once_and_no_held_out_one(pens: Path) -> None:
    taught = lessons(pens, 39)
    assert len({lesson["question"] for lesson in taught}) == 39
    assert not any("had 7 pens" in lesson["question"] for lesson in taught)
    assert all(
        lesson["text"].endswith(f"The answer is {lesson['text'].split('=')[1].split()[0]}\n")
        for lesson in taught
    )


def test_all_are_taught_where_there_are_fewer_than_asked_for(
    pens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(lessons(pens, 60)) == 39
    assert capsys.readouterr().out == (
        "data: mine has 39 worked solutions, and items asks for 60: all are taught\n"
    )


def test_data_without_solutions_is_refused(pens: Path) -> None:
    with pytest.raises(
        UserError, match="data: mine has no worked solutions: no text that ends in its answer"
    ):
        lessons(pens, 5, answer="answer", question="question")


def test_a_set_is_taught_in_its_words_and_without_examples(pens: Path) -> None:
    asks = Asks({}, "tag", "Please: {question}", "Be brief.")
    first = lessons(pens, 3, name="gsm8k", asks=asks)[0]
    system, user, assistant = first["messages"]
    assert system["content"] == "Be brief."
    assert user["content"] == f"Please: Question: {first['question']}\nAnswer:"
    assert assistant["content"].startswith("<think>")
    assert assistant["content"].endswith("</answer>")
    assert "<<" not in assistant["content"]
