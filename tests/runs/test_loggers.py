"""Curves to other programs: what each gets, that nothing is sent twice, and that none can stop a run."""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.cli import app
from farthing.recipe import Recipe, log_to, validate
from farthing.runs import loggers, run
from farthing.runs.loggers import Loggers, numbers

Make = Callable[..., dict[str, Any]]


class Fake:
    """Keeps what it is sent; fails when told to."""

    made: list["Fake"] = []  # noqa: RUF012 (of the test, which empties it)
    breaks_at: int | None = None

    def __init__(self, name: str, recipe: Recipe, folder: Path, new: bool) -> None:
        self.name, self.recipe, self.new = name, recipe, new
        self.sent: list[tuple[str, int, dict[str, float]]] = []
        self.closed: bool | None = None
        Fake.made.append(self)

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if step == Fake.breaks_at:
            raise ConnectionError("no route\nto host")
        self.sent.append((group, step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed = failed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(loggers.BACKENDS, "wandb", Fake)
    monkeypatch.setattr(log_to, "find_spec", lambda name: object())
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "breaks_at", None)
    return Fake


@pytest.fixture
def recipe(tiny_recipe: Make) -> Callable[..., Recipe]:
    def make(*names: str, **settings: Any) -> Recipe:
        return validate({**tiny_recipe(held_out=4, **settings), "log_to": list(names)})

    return make


def test_only_numbers_are_sent() -> None:
    line = {
        "step": 3, "cursor": 9, "reward": 0.5, "kl": None, "loss": float("nan"), "steps": 4, "done": True, "x": "y",
        "seconds_by_activity": {"train": 1, "step": 2.0}, "ci95": [0.25, 0.75],
    }  # fmt: skip
    assert numbers(line) == {
        "reward": 0.5, "steps": 4.0, "seconds_by_activity/train": 1.0, "seconds_by_activity/step": 2.0,
        "ci95/0": 0.25, "ci95/1": 0.75,
    }  # fmt: skip


def test_a_run_sends_every_step_and_both_evaluations(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run(recipe("wandb", steps=3), tmp_path / "mine", quiet=True)
    [made] = fake.made
    assert made.new
    assert made.closed is False
    assert made.name.startswith("mine-")
    assert made.recipe.name == "tiny"
    assert [(group, step) for group, step, _ in made.sent] == [
        ("evaluation", 0), ("01-grpo", 1), ("01-grpo", 2), ("01-grpo", 3), ("evaluation", 3)
    ]  # fmt: skip
    lines = (tmp_path / "mine" / "stages" / "01-grpo" / "metrics.jsonl").read_text().splitlines()
    assert [values["reward"] for _, _, values in made.sent[1:4]] == [
        json.loads(line)["reward"] for line in lines
    ]
    assert {"accuracy", "ci95/0", "ci95/1"} <= made.sent[0][2].keys()


def test_a_continued_run_goes_on_in_the_same_curve_and_repeats_no_step(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loggers.Loggers.log

    def dies(self: Loggers, group: str, step: int, figures: Mapping[str, Any]) -> None:
        real(self, group, step, figures)
        if (group, step) == ("01-grpo", 5):  # after the checkpoint of step 4
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loggers.Loggers, "log", dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe("wandb"), tmp_path / "mine", quiet=True)
    run(recipe("wandb"), tmp_path / "mine", quiet=True)
    first, second = fake.made
    assert first.name == second.name
    assert (first.new, second.new) == (True, False)
    assert first.closed is True
    sent = [(group, step) for made in fake.made for group, step, _ in made.sent]
    assert sent == [("evaluation", 0), *(("01-grpo", step) for step in range(1, 7)), ("evaluation", 6)]


def test_a_logger_added_later_gets_the_steps_that_were_done(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def stop(line: Mapping[str, Any]) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loggers.Loggers, "beside", lambda self, view, stage: loggers._Beside(view, stop))
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), tmp_path / "mine", quiet=True)
    run(recipe("wandb"), tmp_path / "mine", quiet=True)  # log_to may change when a run is continued
    [made] = fake.made
    assert [step for group, step, _ in made.sent if group == "01-grpo"] == [1, 2, 3, 4, 5, 6]


def test_one_that_fails_is_said_once_and_training_goes_on(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.breaks_at = 2
    finished = run(recipe("wandb", steps=4), tmp_path / "mine", quiet=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said == [
        "log_to: wandb failed and gets no more curves (no route to host); training goes on, and metrics.jsonl has "
        "everything"
    ]
    assert len((finished.run_dir / "stages" / "01-grpo" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"id": 3, "steps": {}}', '{"id": "x", "steps": {"wandb": 3}}']
)
def test_a_damaged_note_is_begun_anew(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path, damage: str
) -> None:
    (tmp_path / "logged.json").write_text(damage)
    with Loggers(recipe("wandb"), tmp_path, print) as opened:
        opened.log("01-grpo", 1, {"reward": 1.0})
    assert json.loads((tmp_path / "logged.json").read_text())["steps"] == {"wandb": {"01-grpo": 1}}


def test_what_cannot_be_opened_is_one_line_before_anything_is_loaded(
    fake: type[Fake], recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any) -> Fake:
        raise TimeoutError("api unreachable\nafter 30 s")

    monkeypatch.setitem(loggers.BACKENDS, "wandb", offline)
    with pytest.raises(
        UserError, match=r"log_to: wandb cannot be used \(api unreachable after 30 s\); .*offline"
    ):
        run(recipe("wandb"), tmp_path / "mine", quiet=True)
    assert not (tmp_path / "mine" / "base").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_extra_is_one_line_and_leaves_no_folder(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(log_to, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"log_to: {name} is not installed; pip install 'farthing\[{name}\]'"
    ):
        run(recipe(name), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_dry_run_finds_a_missing_extra_and_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_to, "find_spec", lambda name: None)
    for value, said in (("trackio", "farthing[trackio]"), ("[trackyo]", "log_to")):
        done = CliRunner().invoke(app, ["run", "quickstart", "--dry-run", "--set", f"log_to={value}"])
        assert isinstance(done.exception, UserError)
        assert said in str(done.exception)


def test_a_name_alone_is_a_list_of_it() -> None:
    stage = {"kind": "grpo", "tasks": {"chain_sum": 1}, "steps": 1}
    made = validate({"name": "t", "base": "x", "stages": [stage], "log_to": "trackio"})
    assert made.log_to == ["trackio"]
    assert "wandb" not in sys.modules
    assert "trackio" not in sys.modules


# ---- the real ones, where they are installed ----

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"pip install 'farthing[{name}]'")
    for name in ("wandb", "tensorboard", "trackio")
}


def twice(folder: Path, made: Recipe) -> None:
    """Two attempts; the second does step 2 again."""
    for steps in ((1, 2), (2, 3)):
        with Loggers(made, folder, pytest.fail) as opened:
            for step in steps:
                opened.log(
                    "01-grpo", step, {"step": step, "reward": step / 4, "reward_parts": {"format": 1.0}}
                )
    with Loggers(made, folder, pytest.fail) as opened:
        opened.log("evaluation", 3, {"name": "after", "accuracy": 0.5})


@needs["tensorboard"]
def test_tensorboard_reads_back_every_step_once(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    twice(tmp_path, recipe("tensorboard"))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    events = found.Scalars("01-grpo/reward")
    assert [(event.step, event.value) for event in events] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [event.step for event in found.Scalars("evaluation/accuracy")] == [3]
    assert "01-grpo/reward_parts/format" in found.Tags()["scalars"]
    [text] = found.Tensors("recipe/text_summary")
    assert b"chain_sum" in text.tensor_proto.string_val[0]


@needs["trackio"]
def test_trackios_store_has_every_step_once(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sqlite3

    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    twice(tmp_path, recipe("trackio"))
    assert capsys.readouterr().out == ""
    with sqlite3.connect(tmp_path / "store" / "farthing.db") as store:
        rows = store.execute("select step, metrics from metrics order by id").fetchall()
    steps = [step for step, values in rows if "01-grpo/reward" in json.loads(values)]
    assert steps == [1, 2, 3]
    assert len(rows) == 4


@pytest.mark.slow
@needs["wandb"]
def test_wandb_offline_keeps_the_curves_on_disk(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    twice(tmp_path, recipe("wandb"))
    name = f"{tmp_path.name}-{json.loads((tmp_path / 'logged.json').read_text())['id']}"
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))) == 3
