"""Measured by a held-out subset while training: of other questions than the final ones, the same after an interruption,
and the best weights kept if asked."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from farthing.base.errors import UserError
from farthing.engine import Model
from farthing.evaluate.ask import evaluate
from farthing.evaluate.score import summarise
from farthing.recipe import Recipe, validate
from farthing.runs import run
from farthing.stages import subset
from farthing.tasks.mixture import Mixture, Stream, question_key
from farthing.tasks.pool import VerifierPool

Make = Callable[..., dict[str, Any]]


def recipe_of(tiny_recipe: Make, **evaluate: Any) -> Recipe:
    table = tiny_recipe(held_out=12, steps=7, lr=3e-3)
    table["evaluate"] |= {"every": 3, "subset": 10} | evaluate
    return validate(table)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stages/01-grpo/metrics.jsonl").read_text().splitlines()]


def subset_of(recipe: Recipe) -> list[Any]:
    mixture = Mixture(recipe.evaluation_tasks(), recipe.seed)
    return mixture.held_out(10, {question_key(item.question) for item in mixture.held_out(12)})


def test_the_subset_is_asked_every_so_often_and_no_question_is_shared(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: set[str] = set()
    asked: list[list[str]] = []
    take, ask = Stream.take, subset.evaluate

    def taking(stream: Stream, cursor: int, n: int) -> Any:
        items, after = take(stream, cursor, n)
        trained.update(question_key(item.question) for item in items)
        return items, after

    def asking(model: Any, items: Any, *arguments: Any, **settings: Any) -> Any:
        asked.append([question_key(item.question) for item in items])
        return ask(model, items, *arguments, **settings)

    monkeypatch.setattr(Stream, "take", taking)
    monkeypatch.setattr(subset, "evaluate", asking)
    recipe = recipe_of(tiny_recipe)
    folder = tmp_path / "run"
    run(recipe, folder)
    found = lines(folder)
    assert [line["step"] for line in found if "subset_right" in line] == [3, 6, 7]
    assert all(
        0 <= line["subset_right"] <= 1 and line["subset_n"] == 10 for line in found if "subset_right" in line
    )
    assert len(asked) == 3
    assert asked[0] == asked[1] == [question_key(item.question) for item in subset_of(recipe)]
    final = {
        question_key(json.loads(line)["question"])
        for line in (folder / "evaluations" / "after.jsonl").read_text().splitlines()
    }
    assert len(final) == 12
    assert not final & set(asked[0])
    assert not trained & (final | set(asked[0]))
    assert "held out" in capsys.readouterr().err
    assert "Held-out subset" in (folder / "report.html").read_text()
    booked = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert {line["step"] for line in booked if line["activity"] == "evaluate"} == {None, 2, 5, 6}
    # the last weights are the run's, and the last measurement is of them
    with VerifierPool(1) as pool:
        model = Model(folder / "stages/01-grpo/model")
        records, _ = evaluate(model, subset_of(recipe), recipe.asks(), pool, temperature=0, seed=recipe.seed)
    assert summarise("x", records)["accuracy"] == found[-1]["subset_right"]


def test_without_it_nothing_changes(tiny_recipe: Make, tmp_path: Path) -> None:
    run(recipe_of(tiny_recipe), tmp_path / "with", quiet=True)
    run(recipe_of(tiny_recipe, every=None), tmp_path / "without", quiet=True)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    # other questions are held out, so other ones are trained on, but only after the first that differs
    assert a.keys() == b.keys()
    assert not any("subset_right" in line for line in lines(tmp_path / "without"))


@pytest.mark.parametrize("scores", [[0.4, 0.9, 0.2], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
def test_the_best_weights_are_left_also_after_an_interruption(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float]
) -> None:
    """The weights of the best measurement; measured here by given numbers, so that it is not always the last."""
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def measure(self: Any, model: Any, step: int, steps: int, *_: Any) -> dict[str, Any]:
        if step % self.every and step != steps:
            return {}
        weights[step] = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
        return {"subset_right": scores[[3, 6, 7].index(step)]}

    monkeypatch.setattr(subset.Subset, "measure", measure)
    recipe = recipe_of(tiny_recipe, keep_best=True)
    run(recipe, tmp_path / "whole", quiet=True)
    best = [3, 6, 7][scores.index(max(scores))]
    done = json.loads((tmp_path / "whole/stages/01-grpo/done.json").read_text())
    assert done["best_step"] == best
    left = Model(tmp_path / "whole" / "model").decoder
    for name, parameter in left.named_parameters():
        assert torch.equal(parameter, weights[best][name].to(parameter.dtype)), name

    checkpoint = importlib.import_module("farthing.train.checkpoint")
    real, calls = checkpoint.save, []

    def save(folder: Path, *arguments: Any) -> Any:
        if folder.name == "state" and len(calls) < 2:
            calls.append(arguments[0])
            if len(calls) == 2:  # the checkpoint of step 4 is not written: steps 3 and 4 are lost
                raise KeyboardInterrupt
        return real(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", quiet=True)
    run(recipe, tmp_path / "cut", quiet=True)
    for name in ("model/model.safetensors", "evaluations/after.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line.get("subset_right") for line in lines(tmp_path / "cut")] == [
        line.get("subset_right") for line in lines(tmp_path / "whole")
    ]


def test_an_interrupted_run_measures_the_same(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_recipe, keep_best=True, samples=2, temperature=0.8)
    run(recipe, tmp_path / "whole", quiet=True)
    real, calls = subset.Subset.measure, []

    def measure(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        calls.append(found)
        if len(calls) == 6:  # step 6 was measured, and nothing of it written
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(subset.Subset, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", quiet=True)
    run(recipe, tmp_path / "cut", quiet=True)
    assert calls[5] == calls[7]  # steps 5 and 6 were done again
    measured = [
        [(line["step"], line["subset_right"]) for line in lines(tmp_path / name) if "subset_right" in line]
        for name in ("whole", "cut")
    ]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 3
    for name in ("model/model.safetensors", "evaluations/after.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    after = [json.loads(line) for line in (tmp_path / "cut/evaluations/after.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in after] == [
        (i, s) for i in range(12) for s in range(2)
    ]
    assert "pass@2" in (tmp_path / "cut" / "report.html").read_text()


def test_fine_tuning_is_measured_too(tiny_recipe: Make, tmp_path: Path) -> None:
    table = tiny_recipe(held_out=8)
    digits = table["stages"][0]["tasks"]["chain_sum"]
    sft = {
        "kind": "sft", "data": [{"tasks": {"chain_sum": digits}, "items": 40}], "steps": 4, "batch_tokens": 256,
        "length": 128, "lr": 1e-3,
    }  # fmt: skip
    table |= {"stages": [sft, table["stages"][0] | {"steps": 1}]}
    table["evaluate"] |= {"every": 2, "subset": 6, "keep_best": True}
    run(validate(table), tmp_path / "run", quiet=True)
    found = [
        json.loads(line) for line in (tmp_path / "run/stages/01-sft/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in found if "subset_right" in line] == [2, 4]
    assert json.loads((tmp_path / "run/stages/01-sft/done.json").read_text())["best_step"] in (2, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_best": True}, "keep_best: needs every"),
        ({"samples": 4}, "samples: 4 greedy answers are all the same"),
        ({"every": 0}, "every: must be at least 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    tiny_recipe: Make, settings: dict[str, Any], said: str
) -> None:
    table = tiny_recipe()
    table["evaluate"] |= settings
    with pytest.raises(UserError, match=said):
        validate(table)
