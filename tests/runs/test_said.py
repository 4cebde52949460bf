"""What a run says: that it continues and from where, that nothing had to be done, and what takes long."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from farthing.base.errors import UserError
from farthing.base.waiting import Waiting
from farthing.recipe import Recipe, validate
from farthing.runs import run

Make = Callable[..., dict[str, Any]]
STEPS = 6


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(steps=STEPS)))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return validate(yaml.safe_load(recipe_file.read_text()))


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(recipe_file, folder, quiet=True)
    return folder


def said(process: subprocess.CompletedProcess[str]) -> list[str]:
    assert process.returncode == 0, process.stderr
    return process.stderr.splitlines()


def loud(recipe: Path, folder: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farthing", "run", str(recipe), "--run-dir", str(folder)]
    return subprocess.run(
        [*command, *(word for change in changes for word in ("--set", change))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def test_a_continued_run_says_from_where_and_repeats_no_line(
    finished: Path, recipe_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "again", symlinks=True))
    for name in ("results.json", "report.html", "model", "stages/01-grpo/done.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "stages" / "01-grpo" / "model")
    newest = sorted((folder / "stages" / "01-grpo" / "state").glob("step-*"))
    shutil.rmtree(newest[-1])
    step = int(newest[-2].name.removeprefix("step-"))
    lines = said(loud(recipe_file, folder))
    assert f"01-grpo: continuing from step {step} of {STEPS}" in lines
    assert any(line.startswith(f"continuing {folder}, started ") for line in lines)
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == [f"{number}/{STEPS}" for number in range(step + 1, STEPS + 1)]
    again = said(loud(recipe_file, folder))  # finished now
    assert f"{folder} was finished earlier: nothing had to be done. This is what it came to:" in again
    assert not any(line.startswith(("continuing", "step ")) for line in again)
    [title] = [line for line in again if line.startswith("tiny · ")]
    assert any(
        f"of {title.removeprefix('tiny · ')} on the clock" in line for line in again
    )  # one figure for it


def test_a_damaged_checkpoint_does_not_make_it_lie(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "again", symlinks=True))
    for name in ("results.json", "report.html", "model", "stages/01-grpo/done.json"):
        (folder / name).unlink()
    newest = sorted((folder / "stages" / "01-grpo" / "state").glob("step-*"))
    step = int(newest[-2].name.removeprefix("step-"))
    with (newest[-1] / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    assert f"01-grpo: continuing from step {step} of {STEPS}" in said(loud(recipe_file, folder))


def test_what_finished_earlier_is_said(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "again", symlinks=True))
    for name in ("results.json", "report.html"):
        (folder / name).unlink()
    assert "01-grpo: finished in an earlier attempt" in said(loud(recipe_file, folder))


def test_a_wait_is_said_with_the_time_left(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of a run that may take long is a wait; here every wait takes long."""
    monkeypatch.setattr(
        Waiting, "__exit__", lambda self, *_: (self._say(self.line(60.0)), self._over.set())[0]
    )
    run(recipe, tmp_path / "run")
    lines = capsys.readouterr().err
    for what in ("getting ", "hashing ", "attacking the rewards", "loading the model", "writing the model"):
        assert f"{what}" in lines
    assert "evaluating before training … 1.0 min so far" in lines  # all are answered by then
    assert "evaluating after training … 1.0 min so far" in lines


# ---- any form of a recipe, any state of a directory ----


def test_a_recipe_may_be_a_table(tiny_recipe: Make, tmp_path: Path) -> None:
    table = tiny_recipe(steps=1) | {"evaluate": None}
    assert run(table, tmp_path / "run", quiet=True).results["stages"][0]["steps"] == 1


@pytest.mark.parametrize(
    "odd", [None, 5, [1], b"quickstart", {}, {"name": 3}, {("a", 1): 2}, {"name": object()}, {"base": {1, 2}}]
)
def test_what_is_no_recipe_is_said_in_a_sentence(odd: Any) -> None:
    with pytest.raises(UserError) as error:
        run(odd)
    assert "\n" not in str(error.value)


def test_a_table_that_holds_itself_is_no_recipe() -> None:
    table: dict[str, Any] = {"name": "x"}
    table["stages"] = table
    with pytest.raises(UserError, match="Circular"):
        run(table)


@pytest.mark.parametrize("odd", [5, b"x", "", "a\0b", ["a"], "x" * 300])
def test_what_is_no_directory_is_said_in_a_sentence(
    odd: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        run(recipe, odd, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lock",
        "ledger.jsonl",
        "ledger.open.json",
        "evaluations",
        "stages",
        "stages/01-grpo/state",
        "recipe.yaml",
    ],
)
def test_a_loop_of_links_in_a_run_directory_is_said_in_a_sentence(
    name: str, finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "again", symlinks=True))
    for gone in ("results.json", "report.html", "stages/01-grpo/done.json"):
        (folder / gone).unlink()
    looped = folder / name
    shutil.rmtree(looped) if looped.is_dir() else looped.unlink(missing_ok=True)
    looped.symlink_to(looped.name)
    with pytest.raises(UserError) as error:
        run(recipe, folder, quiet=True)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_quiet_run_says_what_was_left_out(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": good}] * 3 + [{"messages": good[:1]}] * 10
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"kind": "sft", "data": [str(tmp_path / "rows.jsonl")], "policy": "skip"}
    sft |= {"steps": 1, "length": 64, "batch_tokens": 64}
    run(tiny_recipe() | {"stages": [sft], "evaluate": None}, tmp_path / "run", quiet=True)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("01-sft: 10 rows left out (10: the conversation does not end with")
    assert len(said) == 4
