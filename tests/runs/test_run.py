"""Whole runs on the tiny model: what they leave behind, and that killing them changes nothing of it."""

import fcntl
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.data.words import question_key
from farthing.engine import load as load_model
from farthing.recipe import Recipe, validate
from farthing.runs import Run, run
from farthing.tasks.mixture import Mixture, Stream

Make = Callable[..., dict[str, Any]]
MODULE = importlib.import_module("farthing.runs.run")

# Runs the command line, and dies by SIGKILL at the n-th call of a function: python -c … module:function n run
# … The meter's heart, which notes what a killed process had open, beats faster, as these runs live for a
# second.
DIES = """
import importlib, os, signal, sys, time
import farthing.cost.meter
farthing.cost.meter.BEAT_SECONDS = 0.02
where, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
module, _, path = where.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real = getattr(owner, name)
def dies(*args, **kwargs):
    global count
    count -= 1
    if count == 0:
        time.sleep(1)  # fifty beats of the ledger
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, dies)
from farthing.cli import main
main()
"""


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(steps=12)))
    return path


def start(recipe: Path, run_dir: Path, *command: str) -> subprocess.Popen[str]:
    """The real command line, or what `command` makes of it, in a process of its own."""
    command = command or ("-m", "farthing")
    return subprocess.Popen(
        [sys.executable, *command, "run", str(recipe), "--run-dir", str(run_dir), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    until = time.monotonic() + 1200
    while count_lines(path) < count:
        assert process.poll() is None, f"ended ({process.returncode}) before {path.name} had {count} lines"
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(recipe_file, folder)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert out == f"{folder}\n"
    assert err == ""  # quiet
    return folder


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return validate(yaml.safe_load(recipe_file.read_text()))


def assert_same_outcome(folder: Path, expected: Path) -> None:
    for name in (
        "model/model.safetensors",
        "evaluations/before.jsonl",
        "evaluations/after.jsonl",
        "recipe.yaml",
    ):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    state = "stages/01-grpo/state/step-000012/state.safetensors"
    assert (folder / state).read_bytes() == (expected / state).read_bytes()

    def lines(of: Path) -> list[tuple[Any, ...]]:
        text = (of / "stages" / "01-grpo" / "metrics.jsonl").read_text().splitlines()
        same = ("step", "reward", "right", "entropy", "length", "grad_norm", "sync_max", "groups_kept")
        return [tuple(json.loads(line)[key] for key in same) for line in text]

    assert lines(folder) == lines(expected)
    assert [line[0] for line in lines(folder)] == [*range(1, 13)]
    summaries = [json.loads((f / "results.json").read_text()) for f in (folder, expected)]
    for key in ("evaluations", "gain", "seed", "name"):
        assert summaries[0][key] == summaries[1][key]


# ---- what a run leaves behind ----


def test_a_run_leaves_everything_the_design_names(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results.keys() >= {
        "name", "stages", "evaluations", "gain", "wall_seconds", "ledger_covered", "usd", "joules", "seed",
    }  # fmt: skip
    assert [stage["name"] for stage in results["stages"]] == ["01-grpo"]
    assert results["stages"][0].keys() == {"name", "kind", "steps", "seconds"}
    assert [e["name"] for e in results["evaluations"]] == ["before", "after"]
    for evaluation in results["evaluations"]:
        assert evaluation.keys() >= {
            "n", "right", "wrong", "unparsed", "cut_off", "accuracy", "ci95", "by_task",
        }  # fmt: skip
        assert evaluation["n"] == 20
        assert evaluation["ci95"][0] <= evaluation["accuracy"] <= evaluation["ci95"][1]
    assert results["gain"].keys() >= {"difference", "ci95", "on_parseable", "format", "mcnemar_p"}
    difference = results["evaluations"][1]["accuracy"] - results["evaluations"][0]["accuracy"]
    assert results["gain"]["difference"] == pytest.approx(difference)
    assert results["ledger_covered"] >= 0.99
    assert results["wall_seconds"] > 0
    for name in (
        "run.json", "ledger.jsonl", "lineage.json", "audit.json", "report.html", "base/config.json",
        "stages/01-grpo/done.json", "stages/01-grpo/metrics.jsonl", "model/config.json",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    metrics = (finished / "stages" / "01-grpo" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["grad_norm"] is not None for line in metrics) > 3, (
        "hardly anything was trained"
    )
    weights = [(finished / name / "model.safetensors").read_bytes() for name in ("base", "model")]
    assert weights[0] != weights[1]
    assert os.readlink(finished / "model") == "stages/01-grpo/model"  # relative: the directory can be moved
    facts = json.loads((finished / "run.json").read_text())
    assert facts.keys() >= {
        "farthing", "python", "torch", "transformers", "platform", "cpu", "threads", "memory_gb", "device",
        "seed", "commit", "started", "attempts",
    }  # fmt: skip
    assert (facts["seed"], facts["attempts"]) == (3, 1)
    assert not [path.name for path in finished.rglob("*") if ".part" in path.name]


def test_the_ledger_covers_every_activity_of_every_stage(finished: Path) -> None:
    lines, skipped = ledger.read(finished / "ledger.jsonl")
    assert skipped == 0
    assert {line["status"] for line in lines} == {"ok"}
    assert {line["attempt"] for line in lines} == {1}
    activities: dict[str, set[str]] = {}
    for line in lines:
        activities.setdefault(line["stage"], set()).add(line["activity"])
    assert activities["00-base"] >= {"load", "verify", "evaluate"}
    assert activities["01-grpo"] >= {"load", "generate", "verify", "train", "checkpoint"}
    assert activities["99-final"] >= {"evaluate"}
    for activity in ("generate", "train", "evaluate"):
        own = [line for line in lines if line["activity"] == activity]
        assert sum(line["flops"] for line in own) > 0
        assert sum(line["tokens_in"] for line in own) > 0
    steps = {line["step"] for line in lines if line["activity"] == "generate"}
    assert steps == set(range(12))


def test_the_evaluations_hold_every_answer(finished: Path, recipe: Recipe) -> None:
    tasks = {name: task.model_dump() for name, task in recipe.stages[0].tasks.items()}
    items = Mixture(tasks, 3).held_out(20)
    for name in ("before", "after"):
        text = (finished / "evaluations" / f"{name}.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert [r["question"] for r in records] == [item.question for item in items]
        assert [r["gold"] for r in records] == [item.answer for item in items]
        for index, record in enumerate(records):
            assert record["index"] == index
            assert (record["outcome"] == "right") == (record["answer"] == record["gold"])
            assert record["tokens"] > 0


def test_the_model_loads_in_transformers_and_says_the_same(finished: Path, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "stages" / "01-grpo" / "model"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    ours = load_model(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = ours.tokenizer.chat_ids([{"role": "user", "content": "3 + 4 ="}])
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4 ="}], add_generation_prompt=True, return_dict=False
    ) == ids  # fmt: skip
    told = {
        "max_new_tokens": 10,
        "do_sample": False,
        "eos_token_id": sorted(ours.tokenizer.stop_ids),
        "pad_token_id": 0,
    }
    for number in range(8):
        question = f"State the final answer to the following arithmetic problem: {number} + 4 ="
        ids = ours.tokenizer.chat_ids([{"role": "user", "content": question}])
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([ids]), **told)[0, len(ids) :].tolist()
        got = ours.chat([{"role": "user", "content": question}], temperature=0, max_new_tokens=10)
        assert got.ids == expected


def test_no_question_is_both_held_out_and_trained_on(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    real = Stream.take

    def take(stream: Stream, cursor: int, n: int) -> Any:
        items, after = real(stream, cursor, n)
        asked.update(question_key(item.question) for item in items)
        return items, after

    monkeypatch.setattr(Stream, "take", take)
    # 120 of the 200 sums there are, so that most of the stream has to be passed over
    run(validate(tiny_recipe(held_out=120, steps=8, prompts=4, group=2)), tmp_path / "run", quiet=True)
    records = (tmp_path / "run" / "evaluations" / "before.jsonl").read_text().splitlines()
    held_out = {question_key(json.loads(line)["question"]) for line in records}
    assert len(held_out) == 120
    assert len(asked) > 10
    assert not asked & held_out


# ---- coming back ----


def test_a_finished_run_is_shown_again_and_nothing_is_done(
    finished: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    def stamps() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "lock"}

    before = stamps()
    shown = run(recipe, finished)
    assert stamps() == before
    assert isinstance(shown, Run)
    assert shown.results == json.loads((finished / "results.json").read_text())
    assert shown.model_folder == (finished / "stages" / "01-grpo" / "model").resolve()
    assert len(shown.ledger) == count_lines(finished / "ledger.jsonl")
    assert shown.lineage["base"]["sha256"]
    said = capsys.readouterr().err
    for word in ("before:", "after:", "gain:", "generate", f"farthing chat {finished}"):
        assert word in said


def test_a_lost_report_is_written_again(finished: Path, recipe: Recipe) -> None:
    report = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()  # as if killed after results.json
    lines = count_lines(finished / "ledger.jsonl")
    run(recipe, finished, quiet=True)
    assert (finished / "report.html").read_bytes() == report
    assert count_lines(finished / "ledger.jsonl") == lines


def test_killed_five_times_and_more_a_run_ends_the_same_to_the_byte(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    draw = random.Random(20)
    folder = tmp_path / "killed"
    metrics, booked = folder / "stages" / "01-grpo" / "metrics.jsonl", folder / "ledger.jsonl"

    def dies(where: str, count: int) -> None:
        process = start(recipe_file, folder, "-c", DIES, where, str(count))
        _, err = process.communicate(timeout=1200)
        assert process.returncode == -signal.SIGKILL, err

    def killed_when(path: Path, lines: int) -> None:
        process = start(recipe_file, folder)
        wait_for_lines(process, path, lines)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    dies("farthing.evaluate.ask:judge", 1)  # in the first evaluation, its answers sampled
    assert not (folder / "evaluations").exists()
    killed_when(metrics, draw.randint(1, 5))
    assert (folder / "evaluations" / "before.jsonl").exists()
    dies("farthing.train.checkpoint:sync", 1)  # between a checkpoint's files
    assert list((folder / "stages" / "01-grpo" / "state").glob(".*.partial"))
    killed_when(booked, count_lines(booked) + draw.randint(6, 14))
    dies("farthing.base.files:_replace", 1)  # while the stage's model is written
    assert not (folder / "stages" / "01-grpo" / "model").exists()
    dies("farthing.evaluate.ask:judge", 1)  # in the second evaluation
    assert (folder / "stages" / "01-grpo" / "done.json").exists()
    process = start(recipe_file, folder)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err

    assert_same_outcome(folder, finished)
    lines, _ = ledger.read(booked)
    assert {line["attempt"] for line in lines} == {1, 2, 3, 4, 5, 6, 7}
    interrupted = {line["attempt"] for line in lines if line["status"] == "interrupted"}
    assert interrupted >= {1, 3, 5, 6}  # the others may have died between two beats with nothing to tell
    summary = ledger.summarise(lines)
    assert summary.covered >= 0.99
    assert 4 <= summary.interruptions <= 6
    assert json.loads((folder / "run.json").read_text())["attempts"] == 7
    assert json.loads((folder / "results.json").read_text())["ledger_covered"] >= 0.99
    left = [str(path) for path in folder.rglob("*") if ".part" in path.name]
    assert not left


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_the_same_to_the_byte(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    draw, folder, kills = random.Random(), tmp_path / "killed", 0
    while not (folder / "results.json").exists() and kills < 15:
        process = start(recipe_file, folder)
        until = time.monotonic() + 1200
        before = count_lines(folder / "ledger.jsonl")
        while count_lines(folder / "ledger.jsonl") <= before and time.monotonic() < until:
            time.sleep(0.001)  # starting takes longest: the moments after it are the interesting ones
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.communicate()
        kills += 1
    process = start(recipe_file, folder)
    assert process.wait(timeout=1200) == 0
    assert kills >= 2
    assert_same_outcome(folder, finished)
    assert ledger.summarise(ledger.read(folder / "ledger.jsonl")[0]).covered >= 0.99


def test_ctrl_c_says_one_line_and_the_run_goes_on_later(
    recipe_file: Path, recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    process = start(recipe_file, folder)
    wait_for_lines(process, folder / "stages" / "01-grpo" / "metrics.jsonl", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 130
    assert out == ""
    assert err == "farthing: interrupted; run the same command again to continue\n"
    assert not (folder / "results.json").exists()
    assert not (folder / "ledger.open.json").exists()  # the meter was closed in good order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(recipe, folder, quiet=True)
    torch.set_num_threads(threads)
    assert_same_outcome(folder, finished)
    assert {line["attempt"] for line in result.ledger} == {1, 2}
    assert result.results["ledger_covered"] >= 0.99


def test_what_a_lora_run_judges_is_what_it_saved(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = validate(tiny_recipe(held_out=60, lora=4, lr=2e-2, max_grad_norm=1e4))
    first = run(recipe, tmp_path / "run", quiet=True)
    after = tmp_path / "run" / "evaluations" / "after.jsonl"
    answers = after.read_bytes()
    assert answers != (tmp_path / "run" / "evaluations" / "before.jsonl").read_bytes()
    for path in (after, tmp_path / "run" / "results.json"):
        path.unlink()  # as if killed before the last evaluation
    again = run(recipe, tmp_path / "run", quiet=True)
    assert after.read_bytes() == answers
    assert again.results["evaluations"] == first.results["evaluations"]


# ---- directories ----


def test_a_directory_in_use_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"in use by another run.*--run-dir"):
            run(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 2e-3}, "stages.1.lr (0.001, now 0.002)"),
        ({"group": 6, "steps": 40}, "stages.1.steps (12, now 40)"),
        ({"tasks": {"gcd": 1}}, "stages.1.tasks.chain_sum"),
        ({"seed": 4}, "seed (3, now 4)"),
        ({"held_out": 30}, "evaluate.held_out (20, now 30)"),
    ],
)
def test_another_recipe_is_refused_by_its_first_difference(
    finished: Path, tiny_recipe: Make, change: dict[str, Any], named: str
) -> None:
    before = (finished / "recipe.yaml").read_bytes()
    other = validate(tiny_recipe(**{"steps": 12, **change}))
    with pytest.raises(UserError) as said:
        run(other, finished)
    assert named in str(said.value)
    assert "--run-dir" in str(said.value)
    assert (finished / "recipe.yaml").read_bytes() == before


def test_a_directory_with_other_files_is_refused_and_left_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(UserError, match="holds other files and is not a run directory"):
        run(recipe, tmp_path)
    assert (tmp_path / "lock").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "lock"}


def test_a_directory_that_cannot_be_made_is_the_users_to_mend(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        run(recipe, tmp_path / "file" / "run")


def test_a_run_killed_while_it_claimed_its_directory_can_start(tiny_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.partial").write_text("name: ti")
    (tmp_path / "run" / "lock").touch()
    result = run(validate(tiny_recipe(steps=1, held_out=2)), tmp_path / "run", quiet=True)
    assert result.results["stages"][0]["steps"] == 1


# ---- things that stop a run ----


def test_a_failed_audit_stops_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        {"case": "empty", "passed": False},
        {"case": "code", "passed": False},
        {"case": "control", "passed": True},
    ]
    monkeypatch.setattr(MODULE, "audit", lambda *_: {"passed": False, "seconds": 0.0, "cases": cases})
    for _ in range(2):  # and it is not forgotten by asking again
        with pytest.raises(UserError, match="reward audit failed on code, empty; see"):
            run(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "stages").exists()
    assert not (tmp_path / "run" / "evaluations").exists()


def test_a_training_that_diverged_ends_with_the_reason(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = validate(tiny_recipe(max_grad_norm=1e-3, steps=12))
    with pytest.raises(UserError, match=r"training stopped at step \d+: .*max_grad_norm 0\.001"):
        run(recipe, tmp_path / "run", quiet=True)
    lines, _ = ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert [line["activity"] for line in lines if line["status"] == "failed"] == ["train"]
    assert not (tmp_path / "run" / "results.json").exists()


def test_without_an_evaluation_nothing_is_asked(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = validate({**tiny_recipe(steps=2), "evaluate": None})
    result = run(recipe, tmp_path / "run", quiet=True)
    assert result.results["evaluations"] == []
    assert result.results["gain"] is None
    assert not (tmp_path / "run" / "evaluations").exists()
    assert (result.model_folder / "model.safetensors").exists()
