"""A run directory that 0.1.0 left, killed in its second stage, is read, reported, continued and compared.

`data/run-0.1.0` was written by farthing 0.1.0 and is never rewritten; files that nothing reads again are left out.
"""

import json
import shutil
from pathlib import Path

import pytest

from farthing.cost import ledger, spend
from farthing.evaluate.trained import trained_questions
from farthing.recipe import load
from farthing.report import write_report
from farthing.report.compare import as_text, compare
from farthing.runs import run

OLD = Path(__file__).parent / "data" / "run-0.1.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old", symlinks=True))


def test_its_recipe_and_its_ledger_are_read() -> None:
    assert [stage.kind for stage in load(OLD / "recipe.yaml").stages] == ["pretrain", "grpo"]
    lines, skipped = ledger.read(OLD / "ledger.jsonl")
    assert (len(lines), skipped) == (len((OLD / "ledger.jsonl").read_text().splitlines()), 0)
    booked = spend.read_run(OLD)
    assert booked is not None
    assert booked.summary.total.usd > 0
    assert any("are open" in note for note in booked.notes)  # it was killed


def test_it_is_reported(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "of 6 held‑out questions right" in page
    for title in ("Loss", "Validation", "Reward", "Length"):  # both stages' curves
        assert f"{title}</" in page


def test_it_is_continued_and_compared(folder: Path) -> None:
    before = (folder / "evaluations" / "before.jsonl").read_bytes()
    kept = (folder / "stages" / "02-grpo" / "metrics.jsonl").read_text().splitlines()[:2]
    finished = run(load(folder / "recipe.yaml", ["dtype=bfloat16"]), folder, quiet=True)
    assert [stage["steps"] for stage in finished.results["stages"]] == [8, 4]
    assert (folder / "evaluations" / "before.jsonl").read_bytes() == before
    metrics = (folder / "stages" / "02-grpo" / "metrics.jsonl").read_text().splitlines()
    assert metrics[:2] == kept
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]
    assert finished.results["ledger_covered"] >= 0.99
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["attempts"], facts["dtype"]) == (2, "bfloat16")
    assert len(trained_questions(folder)) > 100  # worked solutions and questions of the rewards
    other = shutil.copytree(folder, folder.with_name("other"), symlinks=True)
    found = compare([folder, other])
    assert len(found.runs) == 2
    assert found.left_out == [f"{other} repeats seed 0 of a run with the same recipe"]
    assert "other" in as_text(found)
