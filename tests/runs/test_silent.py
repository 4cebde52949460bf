"""Runs that learn nothing: stopped early with the reason, or said so at the end and in the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.cost import ledger
from farthing.recipe import validate
from farthing.runs import run
from farthing.train.alarms import NothingToLearn
from farthing.weights.folder import same_weights

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def unreadable(tiny_recipe: Make) -> dict[str, Any]:
    """A recipe whose model never writes the box that its answers are read from."""
    return tiny_recipe(held_out=4, answer="boxed", prompts=2, group=3, steps=6, stop_silent=4)


def test_a_run_without_signal_stops_with_its_ledger_and_goes_on_when_told_to(
    unreadable: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(NothingToLearn, match="none of the first 4 steps"):
        run(unreadable, folder)
    said = capsys.readouterr().err
    assert said.count("01-grpo: none of the first 3 steps had anything to learn from") == 1
    assert "01-grpo: 01-grpo" not in said
    assert not (folder / "results.json").exists()
    booked, skipped = ledger.read(folder / "ledger.jsonl")
    assert skipped == 0
    assert sum(line["activity"] == "generate" for line in booked) == 4
    unreadable["stages"][0]["stop_silent"] = None
    finished = run(unreadable, folder)
    said = capsys.readouterr().err
    assert "continuing from step 4 of 6" in said
    assert said.count("01-grpo: training changed no weight") == 2  # when the stage ends, and under the bill
    assert finished.results["stages"][0]["unchanged"] is True
    assert same_weights(folder / "base", finished.model_folder)
    assert "Training changed no weight" in (folder / "report.html").read_text()


def test_a_rate_too_small_to_show_is_said(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(validate(tiny_recipe(held_out=2, steps=2, lr=1e-12)), folder, quiet=True)
    lines = [json.loads(line) for line in (folder / "stages/01-grpo/metrics.jsonl").read_text().splitlines()]
    assert any(line["signal"] for line in lines), "no step had signal; the test shows nothing"
    assert "lr is too small for bfloat16 to show" in capsys.readouterr().err


def test_a_run_that_learns_says_nothing_of_it(tiny_recipe: Make, tmp_path: Path) -> None:
    finished = run(validate(tiny_recipe(held_out=2, steps=3)), tmp_path / "run", quiet=True)
    assert "unchanged" not in finished.results["stages"][0]
    assert not same_weights(tmp_path / "run" / "base", finished.model_folder)
