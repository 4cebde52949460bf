"""Whole runs that start from nothing: pretrain, sft, grpo, what they leave behind, and that killing them changes
nothing of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.data.words import question_key
from farthing.evaluate.trained import trained_questions
from farthing.recipe import load, validate
from farthing.runs import run

SUMS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function that gives the recipe of a run of a few seconds."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"{n} and {n + 1} follow each other, {n % 7} times over"} for n in range(80)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(family: str = "deepseek", **keys: Any) -> dict[str, Any]:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        small |= {} if family == "llama" else {"n_routed_experts": 4, "moe_intermediate_size": 32}
        shared = {"length": 128, "batch_tokens": 512, "checkpoint_every": 2}
        return {
            "name": "from-nothing", "seed": 2,
            "stages": [
                {"kind": "pretrain", "data": [{"tasks": SUMS, "items": 150}, str(text)], "validation": 0.1,
                 "vocab_size": 280, "family": family, "depth": 2, "model": small, "tokens": 2560, "lr": 5e-3,
                 "mtp_depth": int(family == "deepseek"), "validate_every": 2, **shared},
                {"kind": "sft", "data": [{"tasks": SUMS, "items": 60}], "steps": 4, "lr": 3e-3, **shared},
                {"kind": "grpo", "tasks": SUMS, "prompts": 2, "group": 4, "steps": 2, "max_new_tokens": 24,
                 "lr": 1e-3, "checkpoint_every": 1, "sync_every": 1},
            ],
            "evaluate": {"held_out": 12}, **keys,
        }  # fmt: skip

    return recipe


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(written(make(), folder.parent), folder)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return folder


def written(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
    return folder / "recipe.yaml"


def start(recipe: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farthing", "run", str(recipe), "--run-dir", str(folder), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_from_nothing_leaves_three_models_and_a_report(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["01-pretrain", "02-sft", "03-grpo"]
    first = results["stages"][0]
    assert first["tokens"] == 2560
    documents = [first["data"][side]["documents"] for side in ("train", "validation")]
    assert 200 < sum(documents) <= 230  # of those kept apart, copies count once
    assert min(documents) > 10
    assert [e["name"] for e in results["evaluations"]] == ["before", "after"]
    assert results["gain"] is not None
    assert results["ledger_covered"] >= 0.99
    assert not (finished / "base").exists()
    for stage in ("01-pretrain", "02-sft", "03-grpo"):
        config = json.loads((finished / "stages" / stage / "model" / "config.json").read_text())
        assert config["model_type"] == "deepseek_v3"
    report = (finished / "report.html").read_text()
    for said in ("from nothing", "Validation", "Busiest expert", "Loss further ahead", "fine-tuned model"):
        assert said in report, said


def test_what_answers_before_is_the_model_that_enters_the_stage_of_rewards(finished: Path) -> None:
    lines, _ = ledger.read(finished / "ledger.jsonl")
    evaluated = {line["stage"] for line in lines if line["activity"] == "evaluate"}
    assert evaluated == {"01-pretrain", "03-grpo", "99-final"}  # the first is its validation


def test_the_lineage_names_the_data_by_content(finished: Path, make: Make) -> None:
    lineage = json.loads((finished / "lineage.json").read_text())
    assert lineage["base"] is None
    text = next(entry for entry in lineage["data"] if entry["source"].endswith("text.jsonl"))
    assert [len(digest) for digest in text["sha256"].values()] == [64]
    assert lineage["data"][0]["source"] == "reasoning-gym:chain_sum (made by Farthing)"


def test_no_held_out_question_was_taught(finished: Path) -> None:
    asked = {
        question_key(json.loads(line)["question"])
        for line in (finished / "evaluations" / "after.jsonl").read_text().splitlines()
    }
    taught: set[str] = set()
    for path in finished.glob("stages/*/data/lessons-*.jsonl"):
        taught |= {question_key(json.loads(line)["question"]) for line in path.read_text().splitlines()}
    assert len(asked) == 12
    assert len(taught) > 50
    assert not asked & taught
    assert taught <= trained_questions(finished / "model")


def test_the_model_loads_in_transformers_and_says_the_same(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    from farthing.engine import load as load_model

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        finished / "model", dtype=torch.float32, output_loading_info=True
    )
    theirs, report = loaded
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    ours = load_model(finished / "model", dtype="float32")
    ids = torch.tensor([ours.tokenizer.chat_ids([{"role": "user", "content": "3 + 4 ="}])])
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours.logits(ids), expected, atol=1e-4, rtol=1e-4)


def test_killed_in_every_stage_a_run_ends_the_same_to_the_byte(
    finished: Path, make: Make, tmp_path: Path
) -> None:
    recipe, folder = written(make(), tmp_path), tmp_path / "killed"
    for stage, lines in (("01-pretrain", 3), ("02-sft", 3), ("03-grpo", 1)):
        process = start(recipe, folder)
        metrics, until = folder / "stages" / stage / "metrics.jsonl", time.monotonic() + 1200
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(recipe, folder)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    for name in ("evaluations/before.jsonl", "evaluations/after.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    for stage in ("01-pretrain", "02-sft", "03-grpo"):
        one, two = (f / "stages" / stage / "model" / "model.safetensors" for f in (folder, finished))
        assert one.read_bytes() == two.read_bytes(), stage


@pytest.mark.parametrize("family", ["llama", "moe"])
def test_the_other_families_go_the_same_way(make: Make, tmp_path: Path, family: str) -> None:
    result = run(validate(make(family)), tmp_path / "run", quiet=True)
    assert [e["n"] for e in result.results["evaluations"]] == [12, 12]


def test_without_rewards_only_the_result_is_evaluated(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("llama")
    recipe["stages"] = recipe["stages"][:2]
    recipe["evaluate"]["max_new_tokens"] = 16
    result = run(validate(recipe), tmp_path / "run")
    bits = f"{result.results['stages'][0]['val_bits_per_byte']:.3f} bits per byte of validation text"
    assert f"01-pretrain: {bits} at its end" in capsys.readouterr().err
    assert f"{bits} after" in (tmp_path / "run" / "report.html").read_text()
    assert [e["name"] for e in result.results["evaluations"]] == ["after"]
    assert result.results["gain"] is None
    assert not (tmp_path / "run" / "audit.json").exists()


def test_data_that_changed_or_is_missing_stops_the_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 20)
    recipe = make("llama")
    recipe["stages"] = [recipe["stages"][0] | {"data": [str(tmp_path / "text.txt")], "vocab_size": 9999}]
    recipe["evaluate"] = None
    with pytest.raises(UserError, match="vocab_size 9999 exceeds the words of the text"):
        run(validate(recipe), tmp_path / "run", quiet=True)
    (tmp_path / "text.txt").write_text("four five six " * 20)
    with pytest.raises(UserError, match=r"the data in .*text\.txt have changed since"):
        run(validate(recipe), tmp_path / "run", quiet=True)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"text\.txt does not exist; give a file"):
        run(validate(recipe), tmp_path / "run", quiet=True)


def test_the_shipped_recipe_says_what_the_issue_promises() -> None:
    recipe = load("tiny-deepseek")
    assert recipe.base is None
    assert [stage.kind for stage in recipe.stages] == ["pretrain", "sft", "grpo"]
    assert recipe.stages[0].family == "deepseek"  # type: ignore[union-attr]
    assert recipe.evaluate is not None


def test_a_finished_stages_model_that_was_damaged_is_made_again(
    make: Make, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder, symlinks=True)
    (folder / "results.json").unlink()  # as if it had died before its end
    models = [folder / "stages" / name / "model" / "model.safetensors" for name in ("01-pretrain", "03-grpo")]
    whole = [model.read_bytes() for model in models]
    for model, content in zip(models, whole, strict=True):
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    gone = models[1].with_name("config.json")
    gone.unlink()
    done = folder / "stages/02-sft/done.json"
    facts = done.read_text()
    done.write_text(facts.replace('"steps": 4', '"steps": 5'))
    run(validate(make()), folder)
    said = " ".join(capsys.readouterr().err.split())
    assert [model.read_bytes() for model in models] == whole
    for damaged in (models[0], gone):
        assert f"{damaged} has changed since it was written; the stage makes its model again" in said
    assert "02-sft/model" not in said
    assert f"{done} has changed since it was written; the stage makes its model again" in said
    assert done.read_text() == facts
