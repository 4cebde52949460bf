"""Evaluations: outcomes kept apart, and gains split into what was learnt and what was only form."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.tokenizer import question_ids
from farthing.engine import Model, Request, Sample, Sampling
from farthing.evaluate.ask import evaluate, judge
from farthing.evaluate.intervals import mcnemar, paired_difference, wilson
from farthing.evaluate.score import Record, gain, summarise
from farthing.evaluate.suites import Suite, evaluate_sources
from farthing.recipe import Asks, validate
from farthing.tasks import Item, Verdict
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.weights import save_decoder

DIGITS = {"weight": 1, "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
LETTERS = {"r": "right", "w": "wrong", "u": "unparsed", "c": "cut_off", "t": "timeout", "b": "bad_gold"}


def records(letters: str, tasks: str = "") -> list[Record]:
    return [
        {
            "index": i,
            "task": (tasks or "a" * 99)[i],
            "question": f"q{i}",
            "outcome": LETTERS[letter],
            "tokens": i,
        }
        for i, letter in enumerate(letters)
    ]


def test_every_outcome_is_counted_by_itself() -> None:
    summary = summarise("before", records("rrwuctbr", "aabbabba"))
    assert summary["name"] == "before"
    counts = {"n": 8, "right": 3, "wrong": 1, "unparsed": 1, "cut_off": 1, "timeout": 1, "bad_gold": 1}
    assert {key: summary[key] for key in counts} == counts
    assert summary["accuracy"] == 3 / 8
    assert summary["ci95"] == list(wilson(3, 8))
    assert summary["mean_tokens"] == 3.5
    assert list(summary["by_task"]) == ["a", "b"]
    assert (summary["by_task"]["a"]["n"], summary["by_task"]["a"]["right"]) == (4, 3)
    assert (summary["by_task"]["b"]["n"], summary["by_task"]["b"]["right"]) == (4, 0)
    assert summary["by_task"]["a"]["cut_off"] == 1
    for part in (summary, *summary["by_task"].values()):
        assert sum(part[outcome] for outcome in LETTERS.values()) == part["n"]


def test_the_gain_is_split_by_whether_the_first_answer_could_be_read() -> None:
    # readable before: fixed, broken, right, wrong; unreadable before: right, wrong, still unread, right
    before, after = records("wrrw" "uucu"), records("rwrw" "rwcr")  # fmt: skip
    found = gain(before, after)
    assert found["difference"] == pytest.approx(2 / 8)
    right, now_right = ([r["outcome"] == "right" for r in side] for side in (before, after))
    assert found["ci95"] == list(paired_difference(right, now_right)[1:])
    assert found["mcnemar_p"] == mcnemar(right, now_right) == 0.625
    part = found["on_parseable"]
    assert (part["n"], part["difference"]) == (4, 0)
    assert part["ci95"] == list(paired_difference([False, True, True, False], [True, False, True, False])[1:])
    assert found["format"] == {"n": 4, "now_parsed": 3, "now_right": 2, "share_of_all": 2 / 8}
    whole = part["difference"] * part["n"] / 8 + found["format"]["share_of_all"]
    assert found["difference"] == pytest.approx(whole)  # the two parts are the whole


def test_a_gain_without_readable_or_without_unreadable_answers() -> None:
    found = gain(records("ucu"), records("rrw"))
    assert found["on_parseable"] == {"n": 0}
    assert found["format"] == {"n": 3, "now_parsed": 3, "now_right": 2, "share_of_all": 2 / 3}
    found = gain(records("rww"), records("rrc"))
    assert found["on_parseable"]["n"] == 3
    assert found["difference"] == found["on_parseable"]["difference"] == pytest.approx(1 / 3)
    assert found["format"]["n"] == found["format"]["share_of_all"] == 0


def test_only_answers_to_the_same_questions_are_compared() -> None:
    with pytest.raises(ValueError, match="different questions"):
        gain(records("rw"), list(reversed(records("rw"))))
    with pytest.raises(ValueError, match="different questions"):
        gain(records("rw"), records("rwr"))


class Judge:
    def verify(self, pairs: list[tuple[Item, str]], convention: str) -> list[Verdict]:
        assert convention == "final"
        return [Verdict("right" if text == item.answer else "wrong", text) for item, text in pairs]


def test_an_answer_that_ran_out_of_tokens_is_cut_off_even_if_right() -> None:
    items = [Item("t", 0, i, f"q{i}", "7", {"scorer": "integer"}) for i in range(3)]
    samples = [Sample([7], finish_reason=reason) for reason in ("stop", "length", "stop")]
    found = judge(items, ["7", "7", "8"], samples, Judge(), "final")  # type: ignore[arg-type]
    assert [r["outcome"] for r in found] == ["right", "cut_off", "wrong"]
    assert found[1] == {
        "index": 1, "task": "t", "question": "q1", "gold": "7", "text": "7", "outcome": "cut_off",
        "answer": "7", "tokens": 1,
    }  # fmt: skip


def evaluate_source(source: Path, asks: Asks, n: int, seed: int, **how: Any) -> dict[str, Any]:
    suite = Suite("sums", asks, n, temperature=how.pop("temperature", 0.0), samples=how.pop("samples", 1))
    return evaluate_sources([str(source)], [suite], seed=seed, **how)


@pytest.fixture
def setting(tiny_recipe: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    recipe = validate(tiny_recipe())

    def make(n: int = 12, **changes: Any) -> dict[str, Any]:
        asks = recipe.asks()._replace(max_new_tokens=changes.pop("max_new_tokens", 6))
        return {"asks": asks, "n": n, "seed": 3} | changes

    return make


def test_a_model_is_asked_and_judged_as_by_hand(
    tiny_model: Path, setting: Callable[..., dict[str, Any]]
) -> None:
    how = setting()
    found = evaluate_source(tiny_model, **how)
    assert found["n"] == 12
    model = Model(tiny_model)
    right = 0
    for item in Mixture(how["asks"].tasks, 3).held_out(12):
        ids = question_ids(model.tokenizer, item.question, "{question}", None)
        [[sample]] = model.engine().generate([Request(ids, Sampling(6, temperature=0))])
        right += model.tokenizer.decode(sample.ids) == item.answer
    assert 0 < right < 12, "the test model knows all or nothing; the test shows nothing"
    assert found["right"] == right
    assert evaluate_source(tiny_model, **how) == found
    warm = setting(temperature=1.5)
    assert evaluate_source(tiny_model, **warm) == evaluate_source(tiny_model, **warm)


def test_samples_differ_and_the_first_is_what_one_would_be(
    tiny_model: Path, setting: Callable[..., dict[str, Any]]
) -> None:
    how = setting(4)
    items = Mixture(how["asks"].tasks, 3).held_out(4)
    seen: list[Record] = []
    with VerifierPool(1) as pool:
        records, _ = evaluate(
            Model(tiny_model), items, how["asks"], pool, temperature=1.5, seed=3, samples=5, kept=seen.extend
        )
    assert [(r["index"], r["sample"]) for r in records] == [(i, s) for i in range(4) for s in range(5)]
    assert sorted(seen, key=lambda r: (r["index"], r["sample"])) == records
    assert len({r["text"] for r in records}) > 4
    assert all(r["question"] == items[r["index"]].question for r in records)
    found = evaluate_source(tiny_model, **setting(4, temperature=1.5, samples=5))
    assert (found["n"], found["samples"]) == (4, 5)
    assert found["accuracy"] == pytest.approx(sum(r["outcome"] == "right" for r in records) / 20)


def test_an_answer_ends_where_its_question_says(
    tiny_model: Path, setting: Callable[..., dict[str, Any]]
) -> None:
    how = setting(6)
    items = Mixture(how["asks"].tasks, 3).held_out(6)
    with VerifierPool(1) as pool:
        whole, _ = evaluate(Model(tiny_model), items, how["asks"], pool, temperature=0, seed=3)
        place = next(at for at, record in enumerate(whole) if len(record["text"]) > 1)
        last = whole[place]["text"][-1]
        cut = [replace(item, metadata={**item.metadata, "until": [last]}) for item in items]
        found, _ = evaluate(Model(tiny_model), cut, how["asks"], pool, temperature=0, seed=3)
    assert found[place]["text"] == whole[place]["text"].partition(last)[0]
    assert last not in "".join(record["text"] for record in found)


def test_one_long_question_has_the_cache_it_needs(
    tiny_model: Path, setting: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = setting(2)
    found = Mixture(how["asks"].tasks, 3).held_out(1)
    items = [replace(item, metadata={**item.metadata, "asked": "7 " * 45}) for item in found]
    monkeypatch.setattr("farthing.evaluate.ask.PROMPT_TOKENS", 8)
    with VerifierPool(1) as pool:
        [record], _ = evaluate(Model(tiny_model), items, how["asks"], pool, temperature=0, seed=3)
    assert record["question"] == items[0].question


def test_guessing_changes_no_answer_and_is_counted(
    small_deepseek: Callable[..., Any],
    tiny_model: Path,
    setting: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    decoder, hf = small_deepseek()
    folder = save_decoder(decoder, hf, tmp_path / "deepseek", tokenizer_from=tiny_model)
    plain, fast = (evaluate_source(folder, **setting(max_new_tokens=12, speculate=count)) for count in (0, 1))
    (share,) = fast.pop("acceptance")
    assert 0 <= share < 1
    assert fast == plain
    with pytest.raises(UserError, match="speculate is 1, but the model has 0"):
        evaluate_source(tiny_model, **setting(speculate=1))


def test_no_questions_are_refused(tiny_model: Path, setting: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="n is 0"):
        evaluate_source(tiny_model, **setting(n=0))
