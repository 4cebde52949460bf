import json
import re
from pathlib import Path

import pytest

from farthing.base.errors import UserError
from farthing.report.compare import as_json, as_text, compare, write_html

QUESTIONS = [f"What is {number} + 1?" for number in range(100)]


def write_run(
    folder: Path, usd: float, right: int, questions: list[str] = QUESTIONS, task: str = "sums"
) -> Path:
    """A run that got the first `right` questions right."""
    line = {
        "stage": "01-grpo", "activity": "train", "started": 1.7e9, "seconds": 10.0, "device": "cpu: Example",
        "devices": 1, "tokens_in": 1, "tokens_out": 0, "flops": 1, "joules": 1.0, "joules_are": "estimated",
        "usd": usd, "usd_rate": 1.0, "rate_source": "x", "status": "failed", "attempt": 1, "step": None,
    }  # fmt: skip
    (folder / "evaluations").mkdir(parents=True)
    (folder / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    answers = [
        {"task": task, "question": question, "outcome": "right" if place < right else "wrong"}
        for place, question in enumerate(questions)
    ]
    (folder / "evaluations" / "after.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    return folder


def test_the_cheaper_is_first_and_pairs_are_on_the_same_questions(tmp_path):
    found = compare([write_run(tmp_path / "dear", 2.0, 60), write_run(tmp_path / "cheap", 1.0, 40)])
    assert [run.name for run in found.runs] == ["cheap", "dear"]
    assert [run.accuracy for run in found.runs] == [0.4, 0.6]
    (pair,) = found.pairs
    assert (pair.n, pair.difference, pair.usd) == (100, pytest.approx(0.2), 1.0)
    assert pair.ci95 is not None
    assert 0 < pair.ci95[0] < 0.2 < pair.ci95[1]
    assert "a clear difference" in as_text(found)
    assert all(run.on_frontier for run in found.runs)
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["runs"][0]["usd"] == 1.0


def test_a_pair_is_narrower_than_its_two_intervals(tmp_path):
    found = compare([write_run(tmp_path / "a", 1.0, 50), write_run(tmp_path / "b", 1.1, 54)])
    (pair,) = found.pairs
    assert pair.ci95 is not None
    assert pair.ci95[0] > 0, "4 of the same questions answered better, none worse"
    assert found.runs[0].ci95[1] > found.runs[1].ci95[0], "the two alone overlap"


def test_only_common_questions_are_compared(tmp_path):
    first = write_run(tmp_path / "a", 1.0, 100)
    second = write_run(tmp_path / "b", 2.0, 0, [*QUESTIONS[90:], "What is 1 + 1 + 1?"])
    (pair,) = compare([first, second]).pairs
    assert (pair.n, pair.difference) == (10, -1.0)
    other = write_run(tmp_path / "c", 2.0, 1, ["Who?"])
    (pair,) = compare([first, other]).pairs
    assert (pair.n, pair.difference, pair.ci95) == (0, None, None)
    assert "nothing to compare" in as_text(compare([first, other]))


def test_a_question_asked_twice_counts_twice(tmp_path):
    twice = ["Same?", "Same?"]
    (pair,) = compare(
        [write_run(tmp_path / "a", 1.0, 1, twice), write_run(tmp_path / "b", 2.0, 2, twice)]
    ).pairs
    assert (pair.n, pair.difference) == (2, 0.5)


def test_a_run_that_is_beaten_is_not_best_for_the_money(tmp_path):
    found = compare([
        write_run(tmp_path / "good", 1.0, 60), write_run(tmp_path / "worse", 2.0, 50),
        write_run(tmp_path / "better", 3.0, 70),
    ])  # fmt: skip
    assert {run.name: run.on_frontier for run in found.runs} == {"good": True, "worse": False, "better": True}


def test_nothing_right_is_not_the_best_for_any_money(tmp_path):
    runs = [write_run(tmp_path / "cheap", 0.1, 0), write_run(tmp_path / "dear", 2.0, 30)]
    found = compare(runs)
    assert [run.on_frontier for run in found.runs] == [False, True]
    assert as_text(found).count("best for the money") == 1
    none = compare([runs[0], write_run(tmp_path / "other", 0.2, 0)])
    assert "best for the money" not in as_text(none)
    write_html(none, tmp_path / "page.html")
    assert "best for the money</span>" not in (tmp_path / "page.html").read_text()


def test_other_tasks_are_another_scale(tmp_path):
    found = compare([write_run(tmp_path / "a", 1.0, 90), write_run(tmp_path / "b", 2.0, 10, task="proofs")])
    assert all(run.on_frontier for run in found.runs)
    assert "not on one scale" in as_text(found)


def test_what_was_entered_by_hand_is_in_the_price(tmp_path):
    folder = write_run(tmp_path / "a", 1.0, 50)
    entry = {"kind": "data", "what": "x", "usd": 9, "source": "invoice", "date": "2026-11-01"}
    (folder / "entries.jsonl").write_text(json.dumps(entry) + "\n")
    found = compare([folder, write_run(tmp_path / "b", 2.0, 50)])
    assert {run.name: run.usd for run in found.runs} == {"a": 10.0, "b": 2.0}


def test_two_runs_are_needed_and_what_is_left_out_is_named(tmp_path):
    good, empty = write_run(tmp_path / "a", 1.0, 50), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty has no ledger"):
        compare([good, empty])
    found = compare([good, write_run(tmp_path / "b", 1.0, 50), empty])
    assert found.left_out == [f"{empty} has no ledger"]
    (good / "evaluations" / "after.jsonl").unlink()
    with pytest.raises(UserError, match="not evaluated"):
        compare([good, tmp_path / "b"])
    with pytest.raises(UserError, match="not a directory"):
        compare([tmp_path / "nobody", good])


def test_runs_of_the_same_name_keep_their_paths(tmp_path):
    found = compare([write_run(tmp_path / "x" / "run", 1.0, 5), write_run(tmp_path / "y" / "run", 2.0, 5)])
    assert [run.name for run in found.runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_the_page_stands_alone_and_escapes(tmp_path):
    hostile = write_run(tmp_path / "<script>x<", 1.0, 40)
    found = compare([hostile, write_run(tmp_path / "b", 2.0, 60)])
    target = tmp_path / "cmp.html"
    write_html(found, target)
    page = target.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=", page)
    assert page.count('<circle class="fill') == 2
    assert page.count('data-name="95% interval"') == 2  # which a phone shows too
    assert "optional" not in page[page.index("<body") :]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="cannot write"):
        write_html(found, tmp_path / "nowhere" / "cmp.html")


def test_free_runs_have_no_plot_and_no_points_a_dollar(tmp_path):
    found = compare([write_run(tmp_path / "a", 0.0, 40), write_run(tmp_path / "b", 0.0, 60)])
    target = tmp_path / "cmp.html"
    write_html(found, target)
    assert "nothing to plot" in target.read_text()
    assert found.runs[0].points_per_dollar is None
