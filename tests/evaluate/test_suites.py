"""Several suites and models in one evaluation, the same questions for all, and the answers on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.evaluate import suites
from farthing.evaluate.score import gain, summarise
from farthing.evaluate.suites import Suite, evaluate_sources
from farthing.recipe import Asks, validate
from farthing.weights import save_decoder

Lines = list[dict[str, Any]]


@pytest.fixture
def asks(tiny_recipe: Callable[..., dict[str, Any]]) -> Asks:
    return validate(tiny_recipe()).asks()._replace(max_new_tokens=6)


@pytest.fixture
def other(tiny_model: Path, small_deepseek: Callable[..., Any], tmp_path: Path) -> Path:
    decoder, hf = small_deepseek()
    return save_decoder(decoder, hf, tmp_path / "other", tokenizer_from=tiny_model)


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_models_answer_the_same_questions_of_every_suite(
    tiny_model: Path, other: Path, asks: Asks, tmp_path: Path
) -> None:
    saved = tmp_path / "answers.jsonl"
    asked = [Suite("sums", asks, 6), Suite("warm", asks, 3, samples=2, temperature=1.0)]
    card = evaluate_sources([str(tiny_model), str(other)], asked, seed=3, save=saved)
    assert [model["name"] for model in card["models"]] == [str(tiny_model), str(other)]
    found = lines(saved)
    assert [(line["suite"], line["index"]) for line in found[:6]] == [("sums", n) for n in range(6)]
    assert len(found) == 2 * (6 + 3 * 2)
    for number, (source, model) in enumerate(zip((tiny_model, other), card["models"], strict=True)):
        mine = [line for line in found if line["model"] == str(source)]
        assert mine == found[12 * number : 12 * (number + 1)]
        for suite, summary in zip(asked, model["suites"], strict=True):
            assert summary == summarise(suite.name, [line for line in mine if line["suite"] == suite.name])
    for suite, compared in zip(asked, card["compared"], strict=True):
        before, after = (
            [line for line in found if line["suite"] == suite.name and line["model"] == str(source)]
            for source in (tiny_model, other)
        )
        assert [line["question"] for line in before] == [line["question"] for line in after]
        assert compared == {"suite": suite.name, **gain(before, after)}
    assert ("mcnemar_p" in card["compared"][0], "mcnemar_p" in card["compared"][1]) == (True, False)
    assert card["models"][0]["suites"][1]["pass_at"].keys() == {"2"}


def test_one_model_and_one_suite_is_a_summary(tiny_model: Path, asks: Asks) -> None:
    card = evaluate_sources([str(tiny_model)], [Suite("sums", asks, 4)], seed=3)
    assert (card["name"], card["n"]) == (str(tiny_model), 4)
    assert "models" not in card


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupted_evaluation_keeps_its_answers_and_says_so(
    tiny_model: Path, asks: Asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    saved, said = tmp_path / "answers.jsonl", []
    real, calls = suites.evaluate, []

    def stops(*arguments: Any, kept: Callable[[Lines], None], **settings: Any) -> Any:
        def keep(new: Lines) -> None:
            kept(new)
            calls.append(len(new))
            if len(calls) == 2:
                raise error("stop")

        return real(*arguments, kept=keep, **settings)

    monkeypatch.setattr(suites, "evaluate", stops)
    with pytest.raises(error):
        evaluate_sources([str(tiny_model)], [Suite("sums", asks, 60)], seed=3, save=saved, say=said.append)
    assert len(lines(saved)) == sum(calls) < 60
    assert f"{sum(calls)} of 60 answers are kept in {saved}; the same command goes on from there" in said


@pytest.mark.parametrize("samples", [1, 2])
def test_an_interrupted_evaluation_goes_on_where_it_stood(
    tiny_model: Path, asks: Asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    suite = Suite("sums", asks, 20, samples, temperature=samples - 1.0)
    whole = tmp_path / "whole.jsonl"
    card = evaluate_sources([str(tiny_model)], [suite], seed=3, save=whole)
    saved, asked = tmp_path / "answers.jsonl", suites.asked_beside(tmp_path / "answers.jsonl")
    real = suites.evaluate

    def stops(*arguments: Any, kept: Callable[[Lines], None], **settings: Any) -> Any:
        def keep(new: Lines) -> None:
            kept(new)
            raise KeyboardInterrupt

        return real(*arguments, kept=keep, **settings)

    monkeypatch.setattr(suites, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_sources([str(tiny_model)], [suite], seed=3, save=saved)
    monkeypatch.setattr(suites, "evaluate", real)
    before = saved.read_text().splitlines()
    assert 0 < len(before) < 20 * samples
    saved.write_text("\n".join(before)[:-9])  # the last line is torn
    changed = Suite("sums", asks._replace(max_new_tokens=5), 20, samples, temperature=samples - 1.0)
    with pytest.raises(UserError, match=r"other things have changed \(max_new_tokens\)"):
        evaluate_sources([str(tiny_model)], [changed], seed=3, save=saved)

    def counts(_: Any, items: Any, *arguments: Any, earlier: Lines, **settings: Any) -> Any:
        had.append(len(earlier))
        return real(_, items, *arguments, earlier=earlier, **settings)

    had: list[int] = []
    monkeypatch.setattr(suites, "evaluate", counts)
    assert evaluate_sources([str(tiny_model)], [suite], seed=3, save=saved) == card
    assert had == [(len(before) - 1) // samples * samples]
    assert saved.read_text() == whole.read_text()
    assert not asked.exists()
    with pytest.raises(UserError, match="exists; give another --save"):
        evaluate_sources([str(tiny_model)], [suite], seed=3, save=saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 0}, "n is 0"),
        ({"samples": 4}, "4 samples at temperature 0 are all the same; give --temperature"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_model: Path, asks: Asks, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        evaluate_sources([str(tiny_model)], [Suite(**{"name": "s", "asks": asks, "n": 2} | changes)])


def test_a_file_of_answers_is_never_overwritten(tiny_model: Path, asks: Asks, tmp_path: Path) -> None:
    saved = tmp_path / "answers.jsonl"
    saved.write_text("mine\n")
    with pytest.raises(UserError, match="exists; give another --save"):
        evaluate_sources([str(tiny_model)], [Suite("s", asks, 2)], save=saved)
    assert saved.read_text() == "mine\n"
    with pytest.raises(UserError, match="does not exist"):
        evaluate_sources(["no/such/model"], [Suite("s", asks, 2)], save=tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
    for place in (tmp_path, tmp_path / "no" / "answers.jsonl"):
        with pytest.raises(UserError, match="give another --save"):
            evaluate_sources([str(tiny_model)], [Suite("s", asks, 2)], save=place)
