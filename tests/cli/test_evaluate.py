"""`farthing eval` from a shell: what it asks for, and what it says."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from farthing import cli
from farthing.cli.shared import log
from farthing.recipe import load

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run `farthing ARGUMENTS` in this process, in an empty folder: gives (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def farthing_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["farthing", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err

    yield farthing_command
    signal.signal(signal.SIGTERM, handler)


COUNTS = {"n": 10, "right": 1, "wrong": 2, "unparsed": 3, "cut_off": 4, "accuracy": 0.1, "ci95": [0.05, 0.2]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the evaluation: what it was called with."""
    seen: list[Any] = []

    class Suite:
        def __init__(self, name: str, asks: Any, n: int, **settings: Any) -> None:
            self.name, self.asks, self.n, self.settings = name, asks, n, settings

    def evaluate_sources(sources: Sequence[str], suites: Sequence[Suite], **settings: Any) -> dict[str, Any]:
        seen.append((sources, suites, settings))
        counts: dict[str, Any] = dict(COUNTS)
        if settings["speculate"]:
            counts["acceptance"] = [0.9, 0.25]
        if len(sources) == len(suites) == 1:
            return {"name": sources[0], **counts}
        models = [
            {"name": source, "suites": [{"name": s.name, **counts} for s in suites]} for source in sources
        ]
        change = {
            "difference": -0.05,
            "ci95": [-0.15, 0.06],
            "finding": "too few to tell",
            "mcnemar_p": 0.375,
        }
        compared = [{"suite": s.name, **change} for s in suites]
        return {"models": models} | ({"compared": compared} if len(sources) == 2 else {})

    stand_in = ModuleType("farthing.evaluate.suites")
    vars(stand_in).update(Suite=Suite, evaluate_sources=evaluate_sources)
    monkeypatch.setitem(sys.modules, "farthing.evaluate.suites", stand_in)
    return seen


SENTENCE = "10.0% right of 10 (95% interval 5.0% to 20.0%); 2 wrong, 3 unparsed, 4 cut off"


def test_tasks_are_asked_plainly(run: Run, asked: list[Any]) -> None:
    code, out, err = run("eval", "some/folder", "--tasks", "chain_sum=2, gcd", "-n", "10")
    assert (code, err, out) == (0, "", f"some/folder: {SENTENCE}\n")
    [(sources, [suite], settings)] = asked
    assert (sources, suite.n) == (["some/folder"], 10)
    assert {name: task.weight for name, task in suite.asks.tasks.items()} == {"chain_sum": 2.0, "gcd": 1.0}
    assert (suite.asks.prompt, suite.asks.answer, settings["seed"]) == ("{question}", "final", 0)
    assert suite.settings == {"samples": 1, "temperature": 0.0, "by_likelihood": True}


def test_a_recipe_is_asked_in_its_own_way(run: Run, asked: list[Any]) -> None:
    code, out, _ = run("eval", "some/folder", "--recipe", "r1-zero", "--seed", "5", "--json")
    assert code == 0
    assert json.loads(out)["accuracy"] == 0.1
    [(_, [suite], settings)] = asked
    recipe = load("r1-zero", seed=5)
    assert suite.asks == recipe.asks()
    assert suite.n == 500
    assert suite.settings == {"samples": 1, "temperature": 0.0, "by_likelihood": False}
    assert settings.pop("say") is log  # what takes long is said
    assert settings == {
        "seed": 5, "speculate": 0, "device": "auto", "dtype": "auto", "quantize": "exact", "save": None,
    }  # fmt: skip


def test_several_suites_and_samples(run: Run, asked: list[Any]) -> None:
    code, out, _ = run(
        "eval", "a", "--suite", "chain_sum", "--suite", "gcd", "--samples", "4", "--temperature", "0.6",
        "--max-new-tokens", "64", "--generate", "--save", "answers.jsonl",
    )  # fmt: skip
    assert (code, out) == (0, f"a, chain_sum: {SENTENCE}\na, gcd: {SENTENCE}\n")
    [(_, suites, settings)] = asked
    assert [(suite.name, list(suite.asks.tasks), suite.n) for suite in suites] == [
        ("chain_sum", ["chain_sum"], 200), ("gcd", ["gcd"], 200)
    ]  # fmt: skip
    assert suites[0].asks.max_new_tokens == 64
    assert suites[0].settings == {"samples": 4, "temperature": 0.6, "by_likelihood": False}
    assert settings["save"] == Path("answers.jsonl")


def test_a_named_set_has_examples(run: Run, asked: list[Any]) -> None:
    assert run("eval", "a", "--suite", "gsm8k", "--shots", "8")[0] == 0
    assert run("eval", "a", "--tasks", "{mine: {path: x.jsonl, weight: 2}}", "--shots", "3")[0] == 0
    (_, [first], _), (_, [second], _) = asked
    assert first.asks.tasks["gsm8k"].shots == 8
    assert (second.asks.tasks["mine"].shots, second.asks.tasks["mine"].weight) == (3, 2)


def test_two_models_are_compared(run: Run, asked: list[Any]) -> None:
    code, out, _ = run("eval", "a", "b", "--tasks", "chain_sum")
    change = (
        "b against a: −5.0 points (95% interval −15.0 to +6.0), too few questions to tell; McNemar's p 0.38"
    )
    assert (code, out) == (0, f"a: {SENTENCE}\nb: {SENTENCE}\n{change}\n")


def test_guesses_that_were_right_are_said(run: Run, asked: list[Any]) -> None:
    code, out, _ = run("eval", "some/folder", "--tasks", "chain_sum", "--speculate", "2")
    assert (code, asked[0][2]["speculate"]) == (0, 2)
    assert out.endswith("4 cut off; guesses right 90%, 25%\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "c", "--tasks", "gcd"], "takes a model, or two to compare, not 3"),
        (["a", "--tasks", "gcd", "--suite", "gcd"], "needs either --tasks"),
        (["a", "--recipe", "quickstart", "--shots", "2"], "--shots is for --suite and --tasks"),
        (["a", "--tasks", "chain_sum", "--shots", "2"], "--shots: chain_sum has no solved examples"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: list[str], said: str) -> None:
    code, out, err = run("eval", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_real_model_two_suites_and_its_answers(run: Run, tiny_model: Path) -> None:
    digits = "{chain_sum: {config: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}}"
    code, out, _ = run(
        "eval", str(tiny_model), "--tasks", digits, "--n", "5", "--samples", "3", "--temperature", "0.8",
        "--max-new-tokens", "6", "--save", "answers.jsonl",
    )  # fmt: skip
    assert code == 0
    assert "right of 5" in out
    assert "pass@3" in out
    assert "maj@3" in out
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in answers] == [
        (i, s) for i in range(5) for s in range(3)
    ]
    code, _, err = run("eval", str(tiny_model), "--tasks", digits, "--save", "answers.jsonl")
    assert code == 2
    assert "exists; give another --save" in err
