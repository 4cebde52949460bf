"""Files of a run that a person has edited or a disk damaged: one sentence each, and nothing else is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.base.seal import hashes, seal
from farthing.evaluate.trained import trained_questions
from farthing.recipe import load
from farthing.runs import Run, record, run

OLD = Path(__file__).parent / "data" / "run-0.1.0"
ODD = [
    "",
    "{",
    "[1]",
    "null",
    '{"a": ' * 3000,
    "9" * 5000,
    "\x00",
    '{"base": 1, "data": 2, "cases": 3, "dtype": 4}',
]


def said(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old", symlinks=True))


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("name", ["run.json", "lineage.json", "audit.json"])
def test_a_damaged_file_is_named_with_its_remedy(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    read = {
        "run.json": lambda: record.earlier(path, tmp_path),
        "lineage.json": lambda: record.recorded(path, tmp_path),
        "audit.json": lambda: record.audited(path),
    }[name]
    message = said(read)
    assert str(path) in message
    assert "put it back" in message or "delete it" in message
    path.write_bytes(b"\xff\xfe")
    assert str(path) in said(read)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("run.json", {"dtype": "float16"}), ("run.json", {"dtype": None}), ("run.json", {"attempts": "2"}),
        ("run.json", {"attempts": -1}), ("run.json", {"attempts": 10**400}), ("run.json", {"attempts": True}),
        ("lineage.json", {"base": []}), ("lineage.json", {"base": {"sha256": None}}), ("lineage.json", {"data": {}}),
        ("lineage.json", {"data": [1]}), ("lineage.json", {"data": [{"source": None}]}),
        ("audit.json", {"cases": None}), ("audit.json", {"cases": [{"case": 1, "passed": True}]}),
        ("audit.json", {"cases": [{"case": "x", "passed": "yes"}]}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_stops_the_run_before_it_does_anything(
    name: str, changes: dict[str, Any], folder: Path
) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ledger = (folder / "ledger.jsonl").read_bytes()
    read = {
        "run.json": lambda: record.earlier(path, folder),
        "lineage.json": lambda: record.recorded(path, folder),
        "audit.json": lambda: record.audited(path),
    }[name]
    assert str(path) in said(read)
    assert (folder / "ledger.jsonl").read_bytes() == ledger


def test_what_0_1_0_recorded_is_whole() -> None:
    assert record.earlier(OLD / "run.json", OLD)["attempts"] == 1
    assert record.recorded(OLD / "lineage.json", OLD)["base"] is None
    assert record.audited(OLD / "audit.json")["passed"] is True
    assert len(record.records(OLD / "evaluations" / "before.jsonl")) == 6
    assert record.records(OLD / "evaluations" / "none.jsonl") == []


@pytest.mark.parametrize(
    "changes",
    [{"outcome": "good"}, {"outcome": []}, {"tokens": "4"}, {"tokens": 10**400}, {"tokens": -1}, {"question": None},
     {"task": 1}],
)  # fmt: skip
def test_a_damaged_answer_is_named_by_its_line(changes: dict[str, Any], folder: Path) -> None:
    path = folder / "evaluations" / "before.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | changes)
    path.write_text("\n".join(lines))
    assert f"{path} line 3 is not an answer" in said(lambda: record.records(path))
    path.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]))
    assert f"{path} line 3 is not a JSON object" in said(lambda: record.records(path))


def test_evaluations_of_other_questions_are_not_compared(folder: Path) -> None:
    before = record.records(folder / "evaluations" / "before.jsonl")
    assert record.paired(folder, {"before": before, "after": before}) == (before, before)
    after = [{**before[0], "question": "another"}, *before[1:]]
    assert "do not answer the same questions" in said(
        lambda: record.paired(folder, {"before": before, "after": after})
    )


@pytest.mark.parametrize("name", ["run.json", "lineage.json"])
def test_a_run_with_a_damaged_file_says_so_and_keeps_what_it_has(name: str, folder: Path) -> None:
    recipe = load(folder / "recipe.yaml", ["dtype=bfloat16"])
    (folder / name).write_text("{")
    files = {path: path.read_bytes() for path in folder.rglob("*.jsonl") if path.name != "ledger.jsonl"}
    assert name in said(lambda: run(recipe, folder, quiet=True))
    assert {path: path.read_bytes() for path in files} == files
    assert (folder / name).read_text() == "{"


def test_a_finished_run_with_damaged_results_says_how_to_have_them_again(folder: Path) -> None:
    (folder / "results.json").write_text('{"a": ')
    (folder / "report.html").write_text("")
    recipe = load(folder / "recipe.yaml", ["dtype=bfloat16"])
    assert "results.json is not valid JSON" in said(lambda: run(recipe, folder, quiet=True))
    (folder / "lineage.json").write_text("")
    assert "lineage.json" in said(lambda: Run(folder, {}).lineage)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"cursor": null}', '{"cursor": -1}', f'{{"cursor": {10**400}}}']
)
def test_metrics_that_do_not_say_what_was_asked(text: str, folder: Path) -> None:
    (folder / "stages" / "02-grpo" / "metrics.jsonl").write_text(text)
    assert "metrics.jsonl" in said(lambda: trained_questions(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\\ud800", '{"sha256": []}', '{"sha256": 1}', '{"sha256": {"config.json": null}}']
)
def test_a_damaged_record_of_a_finished_stage_is_noticed(text: str, tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert record.changed_since_done(tmp_path, "a") is not None


def test_each_changed_fact_of_a_finished_stage_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    done = seal(
        {"name": "01-sft", "steps": 3, "unchanged": True, "origin": "a", "sha256": hashes(tmp_path / "model")}
    )
    path = tmp_path / "done.json"
    path.write_text(json.dumps(done))
    assert record.changed_since_done(tmp_path, "a") is None
    assert record.changed_since_done(tmp_path, "b") == path  # another run's, whole
    for key in ("name", "steps", "unchanged", "sha256"):
        for changed in ({**done, key: 4}, {name: value for name, value in done.items() if name != key}):
            path.write_text(json.dumps(changed))
            assert record.changed_since_done(tmp_path, "a") == path
    path.write_text(json.dumps(done))
    (tmp_path / "model/config.json").write_text("{ }")
    assert record.changed_since_done(tmp_path, "a") == tmp_path / "model/config.json"
