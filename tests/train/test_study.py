"""The study stage: shared data, every training once, dying changes nothing, and a run from recipe to report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.device import choose
from farthing.base.errors import UserError
from farthing.cost.meter import Meter
from farthing.data.text import Document
from farthing.recipe import Study, validate
from farthing.runs import run
from farthing.stages.sources import is_validation
from farthing.stages.study import Prepared, passages, planned, prepare_study, slices, train_study
from farthing.stages.variants import variants
from farthing.weights import load_decoder

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function that gives a study of two families, two optimizers, one seed and three steps."""
    text = tmp_path_factory.mktemp("text") / "books.jsonl"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "then",
        "it",
        "sleeps",
    ]
    books = [{"text": f"book {n} " + " ".join(words[n % 5 :: 1 + n % 3] * 40)} for n in range(30)]
    text.write_text("".join(json.dumps(book) + "\n" for book in books))

    def make(**keys: Any) -> dict[str, Any]:
        return {
            "kind": "study", "data": [str(text)], "validation": 0.3, "validate_on": 600, "vocab_size": 280,
            "size": "64K", "families": ["dense", "moe+mla+mtp"], "optimizers": {"adamw": 3e-3, "muon": 3e-3},
            "seeds": 1, "tokens": 192, "batch_tokens": 64, "length": 32, "warmup": 1, "validate_every": 2,
            "checkpoint_every": 2, **keys,
        }  # fmt: skip

    return make


def made(stage: dict[str, Any]) -> Study:
    found = validate({"name": "t", "stages": [stage]}).stages[0]
    assert isinstance(found, Study)
    return found


def train(
    stage: dict[str, Any], folder: Path, meter: Meter, stop_at: int | None = None
) -> tuple[Prepared, list[int], list[str]]:
    """Gives the steps that were seen and what was said; `stop_at` cuts the power at that step of them all."""
    said: list[str] = []
    prepared = prepare_study(made(stage), folder, seed=4, held_out=set(), say=said.append)
    steps: list[int] = []

    def watch(line: dict[str, Any]) -> None:
        if line["step"] == stop_at:
            raise KeyboardInterrupt
        steps.append(line["step"])

    train_study(prepared, folder, at=choose("cpu"), meter=meter, on_metrics=watch, say=said.append)
    return prepared, steps, said


def kept(folder: Path) -> dict[str, Any]:
    """What a training leaves that time does not change."""
    varying = {"seconds", "seconds_by_activity", "tokens_per_second", "usd_so_far", "cores_had"}
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("runs/*")):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        facts = json.loads((path / "done.json").read_text())
        model = (path / "model" / "model.safetensors").read_bytes()
        found[path.name] = (
            [{k: v for k, v in line.items() if k not in varying} for line in lines],
            {k: v for k, v in facts.items() if k != "load_average"},
            model,
        )
    return found


def test_a_study_that_died_ends_the_same_and_does_nothing_twice(
    stage: Make, meter: Meter, tmp_path: Path
) -> None:
    prepared, steps, said = train(stage(), tmp_path / "whole", meter)
    assert prepared.steps == 12
    assert steps == list(range(1, 13))
    names = ["dense-adamw-1", "moe+mla+mtp-adamw-1", "dense-muon-1", "moe+mla+mtp-muon-1"]
    assert said == [f"{n} of 4: {name}" for n, name in enumerate(names, 1)]
    for stop_at in (6, 8):  # at a run's end before its last checkpoint, and in the middle
        with pytest.raises(KeyboardInterrupt):
            train(stage(), tmp_path / "died", meter, stop_at)
    _, steps, said = train(stage(), tmp_path / "died", meter)
    assert steps[-1] == 12
    assert min(steps) > 6  # the first two trainings were not done again
    assert said[0] == "3 of 4: dense-muon-1"
    whole = kept(tmp_path / "whole")
    assert kept(tmp_path / "died") == whole
    assert sorted(whole) == sorted(names)
    for lines, facts, _ in whole.values():
        assert [line["step"] for line in lines if "val_bits_per_byte" in line] == [2, 3]
        assert lines[0]["lr"] == lines[-1]["lr"] == 3e-3  # constant
        assert facts["untrained_bits_per_byte"] > 2
        assert facts["active"] == pytest.approx(64_000, rel=0.02)
    left = {path.name for path in (tmp_path / "died" / "runs" / "dense-muon-1").iterdir()}
    assert left == {"done.json", "metrics.jsonl", "model"}


def test_a_run_of_a_study_from_recipe_to_report(stage: Make, tmp_path: Path) -> None:
    recipe = validate({"name": "either", "seed": 4, "stages": [stage()]})
    result = run(recipe, tmp_path / "run", quiet=True)
    [done] = result.results["stages"]
    assert (done["kind"], done["steps"]) == ("study", 12)
    assert result.results["evaluations"] == []
    assert result.results["ledger_covered"] > 0.99
    folder = tmp_path / "run" / "stages" / "01-study"
    found = json.loads((folder / "study.json").read_text())
    assert result.model_folder == (folder / "runs" / found["best"] / "model").resolve()
    load_decoder(result.model_folder)
    assert (folder / "study.md").read_text().startswith("- At equal FLOPs (")
    assert "In the same time and for the same money" in (tmp_path / "run" / "report.html").read_text()
    trained = sum(line["flops"] for line in result.ledger if line["activity"] == "train")
    lines = [
        json.loads(x) for path in folder.glob("runs/*/metrics.jsonl") for x in path.read_text().splitlines()
    ]
    assert sum(line["flops"] for line in lines) == trained


# ---- what is trained, and on what ----


def test_families_take_turns_and_seeds_begin_with_another(stage: Make) -> None:
    study = made(stage(seeds=3, families=["dense", "moe", "moe+mla"], tokens=64))
    runs = planned(study, variants(study, 280), seed=10)
    assert [one.name for one in runs][:4] == [
        "dense-adamw-1",
        "moe-adamw-1",
        "moe+mla-adamw-1",
        "dense-muon-1",
    ]
    assert [one.name for one in runs][6:9] == ["moe-adamw-2", "moe+mla-adamw-2", "dense-adamw-2"]
    assert {one.seed for one in runs if one.number == 3} == {12}
    assert len({one.name for one in runs}) == len(runs) == 18


def test_whole_documents_are_kept_apart_and_a_slice_is_scored(stage: Make, tmp_path: Path) -> None:
    study = made(stage())
    prepared = prepare_study(study, tmp_path, seed=4, held_out=set(), say=print)
    assert study.data[0].path is not None
    texts = [json.loads(line)["text"] for line in Path(study.data[0].path).read_text().splitlines()]
    apart = [text for text in texts if is_validation(text, 0.3)]
    learnt = [
        prepared.tokenizer.decode(prepared.train.document(n).tolist())
        for n in range(prepared.train.documents)
    ]
    assert "".join(learnt) == "".join(text for text in texts if text not in apart)
    assert len(learnt) > len(texts)  # in passages
    scored = [
        prepared.tokenizer.decode(prepared.scored.document(n).tolist())
        for n in range(prepared.scored.documents)
    ]
    assert all(any(part in text for text in apart) for part in scored)
    assert 500 <= prepared.scored.bytes <= 600
    assert prepared.facts()["validation"]["bytes"] == prepared.scored.bytes


@given(text=st.text("ab\n", max_size=300), characters=st.integers(2, 40))
def test_passages_are_the_whole_document(text: str, characters: int) -> None:
    found = [part.text for part in passages([Document(text, "")], characters)]
    assert "".join(found).replace("\n", "") == text.replace("\n", "")
    assert all(part.strip() and len(part) <= 1.5 * characters for part in found)
    assert all(len(part) >= characters // 2 for part in found[:-1])


def test_passages_end_with_a_line_where_there_is_one() -> None:
    lines = "one two\n" * 20
    assert [part.text for part in passages([Document(lines, "")], 30)] == ["one two\n" * 3] * 5 + [
        "one two\n" * 5
    ]


def test_a_slice_is_of_many_documents_from_their_middle() -> None:
    books = [Document("x" * 100 + f"{n}" * 100 + "x" * 100, "") for n in range(9)]
    assert [part.text for part in slices(books, 800)] == [f"{n}" * 100 for n in range(8)]
    long = Document("abc" * 30 + "middle here" + "abc" * 30, "")
    assert [part.text for part in slices([Document("short", ""), long], 80)] == ["short", "middle her"]
    assert list(slices([], 80)) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"validation": 1e-9}, "validation: 1e-09 falls on none of the documents"),
        ({"data": ["missing.jsonl"]}, "missing.jsonl does not exist"),
        ({"size": "9K"}, "size: no "),
    ],
)
def test_what_cannot_be_studied_is_said_in_a_sentence(
    stage: Make, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        prepare_study(made(stage(**keys)), tmp_path, seed=4, held_out=set(), say=print)
