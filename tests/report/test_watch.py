"""A run seen from outside: running, finished, killed, damaged."""

import fcntl
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from farthing.base.errors import UserError
from farthing.report import watch
from farthing.report.watch import follow, is_running, snapshot

Build = Callable[..., Path]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The lock of a run that is going on."""
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def line(step: int, **changes: Any) -> str:
    figures = {"step": step, "reward": step / 10, "right": 0.5, "seconds": 2.0, "usd_so_far": 0.01, **changes}
    return json.dumps(figures) + "\n"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run directory as it is four steps into a stage of ten."""
    folder = tmp_path / "mine"
    stage = folder / "stages" / "01-grpo"
    stage.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: mine\nstages: [{kind: grpo, steps: 10}]\n")
    (folder / "run.json").write_text('{"attempts": 2}')
    (folder / "lock").touch()
    (stage / "steps.json").write_text('{"steps": 10}')
    (stage / "metrics.jsonl").write_text("".join(map(line, range(1, 5))))
    return folder


def console() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=200, _environ={}), output


def test_a_running_run_is_told_by_its_lock_and_has_time_left(begun: Path) -> None:
    assert not is_running(begun)
    with held(begun):
        assert is_running(begun)
        found = snapshot(begun)
    assert (found.state, found.stage, found.step, found.steps) == ("running", "01-grpo", 4, 10)
    assert found.seconds_left == pytest.approx(12.0)
    assert found.latest["reward"] == pytest.approx(0.4)
    assert "mine is running: 01-grpo, step 4 of 10, 12 s left of the stage" in found.sentence()


def test_a_run_that_is_not_running_says_since_when_and_how_it_stopped(begun: Path) -> None:
    found = snapshot(begun)
    assert found.state == "stopped"
    assert found.seconds_left is None
    assert "mine is not running since 2" in found.sentence()
    assert "it stopped at 01-grpo, step 4 of 10" in found.sentence()
    (begun / "ledger.open.json").write_text('{"ledger_bytes": 0, "lines": []}')
    assert "it was killed at" in snapshot(begun).sentence()


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "stopped with an error"), ("interrupted", "was interrupted")]
)
def test_the_ledger_tells_how(begun: Path, build_run: Build, status: str, said: str) -> None:
    booked = [json.loads(text) for text in (build_run() / "ledger.jsonl").read_text().splitlines()]
    booked[-1]["status"] = status
    (begun / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in booked))
    assert f"it {said} at" in snapshot(begun).sentence()


def test_a_finished_run_has_its_bill_and_its_scores(build_run: Build) -> None:
    folder = build_run()
    found = snapshot(folder)
    results = json.loads((folder / "results.json").read_text())
    assert found.state == "finished"
    assert found.usd > 0
    assert found.seconds == pytest.approx(results["wall_seconds"])
    assert "finished at" in found.sentence()
    assert "right: before" in found.sentence()
    json.dumps(found.as_json(), allow_nan=False)


def test_without_its_number_of_steps_the_recipes_is_taken(begun: Path) -> None:
    (begun / "stages" / "01-grpo" / "steps.json").unlink()
    assert snapshot(begun).steps == 10
    (begun / "recipe.yaml").write_text("stages: 3")
    assert snapshot(begun).steps is None


DAMAGED = [
    "",
    "{",
    "[]\n",
    '{"step": "x"}\n',
    '{"step": 1e400}\n',
    '{"step": 1, "seconds": "soon", "seconds_by_activity": 3, "reward_parts": [1]}\n',
    '{"step": 2, "reward": NaN, "reward_parts": {"a": "b", "c": 1}}\n',
    "\0\xff\n",
    '{"step": 1}',
]
READ = ("steps.json", "recipe.yaml", "run.json", "results.json", "ledger.jsonl", "ledger.open.json")


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_no_traceback(begun: Path, damage: str) -> None:
    stage = begun / "stages" / "01-grpo"
    for path in (stage / "metrics.jsonl", stage / READ[0], *(begun / name for name in READ[1:])):
        path.write_text(damage)
        with held(begun):
            found = snapshot(begun)
        json.dumps(found.as_json(), allow_nan=False)
        assert "\n" not in found.sentence()


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no run directory"):
            snapshot(folder)


def test_a_run_is_followed_through_its_stages_to_its_end(begun: Path) -> None:
    """Written to by another thread: more steps, a killed attempt's steps again, and a second stage."""
    to, output = console()
    first = begun / "stages" / "01-grpo"
    second = begun / "stages" / "02-grpo"
    ready = threading.Event()

    def go_on() -> None:
        with held(begun):
            ready.set()
            wait_for(output, "step 4/10")
            with (first / "metrics.jsonl").open("a") as file:
                file.write(line(5) + line(6)[:9])
                file.flush()
                wait_for(output, "step 5/10")
                file.write(line(6)[9:])
            wait_for(output, "step 6/10")
            other = first / "other"
            other.write_text("".join(map(line, range(1, 8))))  # cut back to its checkpoint, and further
            other.replace(first / "metrics.jsonl")
            wait_for(output, "step 7/10")
            (first / "done.json").write_text("{}")
            second.mkdir()
            (second / "steps.json").write_text('{"steps": 3}')
            (second / "metrics.jsonl").write_text(line(1))
            wait_for(output, "step 1/3")
            with (second / "metrics.jsonl").open("a") as file:
                file.write(line(2))
            wait_for(output, "step 2/3")

    thread = threading.Thread(target=go_on)
    thread.start()
    assert ready.wait(60)
    found = follow(begun, to, poll=0.01)
    thread.join(60)
    assert found.state == "stopped"
    said = output.getvalue()
    for step in (4, 5, 6, 7):
        assert said.count(f"step {step}/10") == 1
    assert "step 3/10" not in said  # what was done before is in the picture, not said again
    assert said.splitlines()[-1].startswith("mine is not running since")


def wait_for(output: io.StringIO, said: str) -> None:
    until = time.monotonic() + 60
    while said not in output.getvalue():
        assert time.monotonic() < until, f"{said!r} was not said: {output.getvalue()}"
        time.sleep(0.002)


def test_one_that_is_over_is_said_once(begun: Path) -> None:
    to, output = console()
    assert follow(begun, to).state == "stopped"
    assert len(output.getvalue().splitlines()) == 1


def test_looking_changes_nothing(begun: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in begun.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    follow(begun, console()[0])
    snapshot(begun)
    assert state() == before
    assert watch.is_running(begun) is False
