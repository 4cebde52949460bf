"""Runs whose rewards ask models: what they leave behind, that an interruption changes nothing, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from farthing import plans
from farthing.base.errors import UserError
from farthing.base.files import sha256
from farthing.cost import ledger
from farthing.recipe import validate
from farthing.runs import run
from farthing.train.grpo import Learner

Make = Callable[..., dict[str, Any]]
SUM = "State the final answer to the following arithmetic problem: {} + {} ="


@pytest.fixture
def rewarded(tiny_recipe: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives the recipe of a short run on sums of its own, with these rewards."""
    rows = [{"question": SUM.format(a, b), "answer": str(a + b)} for a in range(10) for b in range(10)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*rewards: Any, steps: int = 3) -> dict[str, Any]:
        tasks = {"sums": {"path": str(path), "reward": list(rewards)}}
        return tiny_recipe(held_out=4, tasks=tasks, prompts=2, group=4, steps=steps, checkpoint_every=1)

    return make


def scored_by(folder: Path) -> dict[str, Any]:
    return {"use": "reward_model", "weight": 0.5, "settings": {"model": str(folder)}}


def judged_by(folder: Path) -> dict[str, Any]:
    settings = {"model": str(folder), "prompt": "{question} {completion}", "max_new_tokens": 4}
    return {"use": "judge", "settings": settings}


def test_a_run_interrupted_anywhere_ends_the_same(
    rewarded: Make, tiny_model: Path, tiny_reward: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scorer = tiny_reward()
    recipe = validate(rewarded("number", scored_by(scorer), judged_by(tiny_model)))
    whole = run(recipe, tmp_path / "whole", quiet=True)
    learn, calls = Learner.learn, 0

    def interrupted(self: Learner, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr(Learner, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", quiet=True)
    run(recipe, tmp_path / "again", quiet=True)
    ended = [sha256(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")]
    assert ended[0] == ended[1]

    metrics = [json.loads(line) for line in (whole.run_dir / "stages/01-grpo/metrics.jsonl").open()]
    assert set(metrics[0]["reward_parts"]) == {"number", "reward_model", "judge"}
    assert metrics[0]["judge_calls"] > 0
    assert metrics[0]["seconds_by_activity"]["judge"] > 0
    lines, _ = ledger.read(whole.run_dir / "ledger.jsonl")
    asked = [line for line in lines if line["activity"] == "judge"]
    assert {line["stage"] for line in asked} == {"00-base", "01-grpo", "99-final"}
    assert all(line["tokens_in"] and line["flops"] for line in asked)
    assert {line["step"] for line in asked if line["stage"] == "01-grpo"} == {0, 1, 2}
    lineage = json.loads((whole.run_dir / "lineage.json").read_text())
    assert {entry["use"]: entry["source"] for entry in lineage["judges"]} == {
        "reward_model": str(scorer),
        "judge": str(tiny_model),
    }
    page = (whole.run_dir / "report.html").read_text()
    assert "Reward: reward_model" in page
    assert lineage["judges"][0]["sha256"]["model.safetensors"] in page


def test_a_reward_model_that_changed_is_refused(
    rewarded: Make, tiny_reward: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = tiny_reward()
    recipe = validate(rewarded(scored_by(scorer)))

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    tensors = load_file(scorer / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, scorer / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights of the reward_model .* have changed since"):
        run(recipe, tmp_path / "run", quiet=True)


def test_other_models_are_refused_before_anything_is_computed(
    rewarded: Make, tiny_model: Path, tiny_reward: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"tasks: sums: reward_model: .* is no reward model"):
        run(rewarded(scored_by(tiny_model)), folder, quiet=True)
    with pytest.raises(UserError, match="is a classifier with 3 labels"):
        run(rewarded(scored_by(tiny_reward("qwen2", num_labels=3))), folder, quiet=True)
    assert not folder.exists()
    with pytest.raises(UserError, match="holds a reward model, which writes no text"):
        run(rewarded(judged_by(tiny_reward("qwen3"))), folder, quiet=True)
    with pytest.raises(UserError, match=r"\./gone does not exist"):
        run(rewarded({"use": "reward_model", "settings": {"model": "./gone"}}), folder, quiet=True)
    assert not (folder / "evaluations").exists()


def test_a_plan_has_room_for_the_models(
    rewarded: Make, tiny_model: Path, tiny_reward: Callable[..., Path]
) -> None:
    def planned(*rewards: Any) -> Any:
        return plans.plan(validate(rewarded(*rewards)), device="h100")

    alone, scored, both = (
        planned("number"),
        planned("number", scored_by(tiny_reward())),
        planned("number", scored_by(tiny_reward()), judged_by(tiny_model)),
    )
    assert alone.memory_bytes < scored.memory_bytes < both.memory_bytes
    weights = [plan.stages[1].memory.weights for plan in (alone, scored)]
    assert weights[1] - weights[0] > 2 * 90_000  # bytes of the reward model in bfloat16
    assert "judge" not in alone.stages[1].seconds
    assert 0 < scored.stages[1].seconds["judge"] < both.stages[1].seconds["judge"]
    assert alone.stages[1].flops < scored.stages[1].flops
