"""Tasks from data: what an item is, which rows train and which are held out, examples, lineage."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.files import sha256
from farthing.data.overlap import HeldOut
from farthing.recipe import TaskSetting, dump, load, validate
from farthing.tasks.audit import audit
from farthing.tasks.data import DataTask
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.tasks.solutions import solution_conversation, solution_text
from farthing.tasks.table import Columns, table


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def word_problems(count: int, start: int = 0) -> list[dict[str, Any]]:
    """In GSM8K's columns."""
    return [
        {
            "question": f"Ada has {n} pens and buys 2 more. How many has she?",
            "answer": f"She has {n} + 2 = <<{n}+2={n + 2}>>{n + 2} pens.\n#### {n + 2}",
        }
        for n in range(start, start + count)
    ]


def task(path: Path, name: str = "mine", **keys: Any) -> DataTask:
    return DataTask(name, TaskSetting(path=str(path), **keys))


@pytest.fixture
def pens(tmp_path: Path) -> Path:
    return write(tmp_path / "pens.jsonl", word_problems(40))


# ---- items ----


def test_an_item_has_its_row_and_its_rewards_and_is_plain_json(pens: Path) -> None:
    made = task(pens)
    item = made.item(3, 0)
    row = next(row for row in word_problems(40) if row["question"] == item.question)
    assert item.answer == row["answer"].rpartition("#### ")[2]
    assert item.metadata["row"] == row
    assert item.metadata["place"] == f"pens.jsonl:{int(row['question'].split()[2]) + 1}"
    assert item.metadata["scorer"] == "rewards"
    assert item.metadata["rewards"] == [{"use": "number", "weight": 1.0, "settings": {}}]
    assert item.asked == item.question
    assert "<<" not in item.metadata["solution"]
    assert json.loads(json.dumps(dict(item.metadata))) == item.metadata
    assert made.item(3, 0) == task(pens).item(3, 0)


def test_an_epoch_has_every_row_once_and_the_next_another_order(pens: Path) -> None:
    made = task(pens)
    first, second = ([made.item(5, index).question for index in range(at, at + 40)] for at in (0, 40))
    assert len(set(first)) == 40
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != [made.item(6, index).question for index in range(40)]


def test_a_prompt_of_messages_keeps_its_system_message(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}]
    path = tmp_path / "verl.parquet"
    row = {"prompt": turns, "reward_model": {"ground_truth": "7"}, "image": {"bytes": b"x", "path": "a.png"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    made = task(path)
    item = made.item(0, 0)
    assert (item.question, item.answer, item.system) == ("3 + 4?", "7", "Be brief.")
    assert made.said == [f"tasks: mine: {path}: 1 column without text or numbers ignored: image"]


@pytest.mark.parametrize(
    ("answers", "use"), [(["7", "1,000"], "number"), (["Paris", "the Nile"], "exact"), ([7, 8.5], "number")]
)
def test_the_answers_decide_the_verifier_unless_the_recipe_does(
    tmp_path: Path, answers: list[Any], use: str
) -> None:
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    path = write(tmp_path / "a.jsonl", rows)
    assert [part.use for part in task(path).rewards] == [use]
    assert [part.use for part in task(path, reward="exact").rewards] == ["exact"]


def test_rows_with_options_are_judged_by_their_letter(tmp_path: Path) -> None:
    row = {"question": "Which is a planet?", "choices": ["Mars", "the Moon"], "answer": 0}
    item = task(write(tmp_path / "a.jsonl", [row])).item(0, 0)
    assert item.question == "Which is a planet?\nA. Mars\nB. the Moon"
    assert item.answer == "A"
    assert item.metadata["choices"] == ["Mars", "the Moon"]
    assert item.metadata["rewards"][0]["use"] == "choice"


# ---- rows that cannot be used ----


OPTIONS = [
    {"question": f"What is {n} + 1?", "choices": [str(n), str(n + 1)], "answer": "B", "steps": "x"}
    for n in range(9)
]


def test_options_of_ones_own_are_compared_by_likelihood_as_the_question_shows_them(tmp_path: Path) -> None:
    path = write(tmp_path / "options.jsonl", OPTIONS)
    item = next(task(path).held_out())
    asked = item.question.splitlines()[0]
    n = int(asked.split()[2])
    assert item.metadata["likelihood"] == {
        "context": f"Question: {asked}\nA. {n}\nB. {n + 1}\nAnswer:", "endings": [" A", " B"], "right": 1,
    }  # fmt: skip
    item = next(task(path, question="{question}").held_out())  # does not show them
    n = int(item.question.split()[2])
    assert item.metadata["likelihood"] == {
        "context": f"Question: {item.question}\nAnswer:", "endings": [f" {n}", f" {n + 1}"], "right": 1,
    }  # fmt: skip
    context = next(task(path, shots=1).held_out()).metadata["likelihood"]["context"]
    assert context.count("\nAnswer: B\n\nQuestion: ") == 1
    context = next(task(path, question="{question}", shots=1).held_out()).metadata["likelihood"]["context"]
    shown, answer = context.removeprefix("Question: What is ").partition("\n\n")[0].split("\nAnswer: ")
    assert int(answer) == int(shown.split()[0]) + 1
    assert "likelihood" not in next(task(path, reward="exact").held_out()).metadata


def test_rows_that_cannot_be_used_are_counted_with_three_examples(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = word_problems(20)
    for at in (2, 5, 7, 11, 13):
        rows[at]["answer"] = "no marker"
    rows[17]["question"] = rows[0]["question"].upper()
    made = task(write(tmp_path / "a.jsonl", rows), answer={"column": "answer", "after": "####"})
    assert len(made.questions) == 14
    assert made.said[0].startswith(
        "tasks: mine: 6 rows left out (5: its answer has no '####'; 1: asks what an earlier"
    )
    assert made.said[1:] == [f"  a.jsonl:{at}: its answer has no '####'; left out" for at in (3, 6, 8)]


def test_when_more_than_half_cannot_be_used_the_first_reason_is_said(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "7" if n < 3 else None} for n in range(10)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        UserError, match=r"^tasks: mine: 7 of the 10 rows of \S+ cannot be used \(a.jsonl:4: it has no"
    ):
        task(path)


def test_no_rows_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        task(tmp_path / "a.jsonl")


# ---- held out ----


@given(st.integers(1, 60), st.integers(0, 60), st.randoms(use_true_random=False))
def test_a_shuffled_or_grown_file_keeps_its_split(
    tmp_path_factory: pytest.TempPathFactory, held: int, grown: int, chance: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = word_problems(80)
    before = [
        i.question for i in Mixture({"a": {"path": str(write(folder / "a.jsonl", rows))}}, 0).held_out(held)
    ]
    chance.shuffle(rows)
    shuffled = Mixture({"a": {"path": str(write(folder / "b.jsonl", rows))}}, 0)
    assert [item.question for item in shuffled.held_out(held)] == before
    assert [shuffled.train(n).question for n in range(9)] == [
        Mixture({"a": {"path": str(folder / "a.jsonl")}}, 0).train(n).question for n in range(9)
    ]
    more = rows + word_problems(grown, start=80)
    after = Mixture({"a": {"path": str(write(folder / "c.jsonl", more))}}, 0).held_out(held)
    trained = {row["question"] for row in rows} - set(before)
    assert not trained & {
        item.question for item in after
    }  # what trained before the file grew is still not asked


def test_held_out_questions_are_the_same_for_every_seed(pens: Path) -> None:
    """Runs that differ in their seed are compared on the same questions, and none asks what another trained on."""
    one, two = (Mixture({"a": {"path": str(pens)}}, seed).held_out(10) for seed in (0, 1))
    assert {item.question for item in one} == {item.question for item in two}


def test_data_smaller_than_what_was_asked_for_is_asked_whole(pens: Path) -> None:
    assert len(Mixture({"a": {"path": str(pens)}}, 0).held_out(200)) == 40


def test_holding_out_everything_leaves_nothing_to_train_on(pens: Path) -> None:
    mixture = Mixture({"a": {"path": str(pens)}}, 0)
    held_out = HeldOut(item.question for item in mixture.held_out(200))
    with pytest.raises(
        UserError, match=r"a: of the 40 questions of .*pens.jsonl .* lower held_out or subset"
    ):
        mixture.stream(held_out)


def test_questions_of_an_evaluation_file_never_train(tmp_path: Path, pens: Path) -> None:
    test = write(tmp_path / "test.jsonl", word_problems(30, start=30))  # ten of them are in pens
    stage = {"pens": TaskSetting(path=str(pens))}
    apart = Mixture({"mine": {"path": str(test)}}, 0).never_trained([stage])
    assert apart == {row["question"] for row in word_problems(30, start=30)}
    assert Mixture(stage, 0).never_trained([stage]) == set()


# ---- mixtures with generators ----


def test_a_mixture_with_data_leaves_no_row_of_an_epoch_out(pens: Path) -> None:
    mixture = Mixture({"pens": {"path": str(pens)}, "chain_sum": 2}, 4)
    drawn = [mixture.train(index) for index in range(200)]
    rows = [item.question for item in drawn if item.task == "pens"]
    assert 45 < len(rows) < 90
    assert len(set(rows[:40])) == 40
    assert Counter(rows[:80]).most_common(1)[0][1] <= 2
    sums = [item for item in drawn if item.task == "chain_sum"]
    assert all(item == mixture.tasks["chain_sum"].item(item.seed, item.index) for item in sums)
    again = Mixture({"pens": {"path": str(pens)}, "chain_sum": 2}, 4)
    assert [again.train(index) for index in range(150, 200)] == drawn[150:]  # the cursor alone resumes


# ---- examples ----


def test_examples_are_never_asked(pens: Path) -> None:
    made = task(pens, shots=3)
    asked = [made.item(0, index) for index in range(37)]
    held = list(made.held_out())
    for items in (asked, held):
        shown = items[0].asked.split("Question: ")[1:-1]
        assert len(shown) == 3
        assert len({item.question for item in items}) == 37
        assert not any(item.question in example for item in items for example in shown)
    assert asked[0].asked.endswith(f"Question: {asked[0].question}\nAnswer:")
    assert "Answer: She has" in asked[0].asked
    assert "\nThe answer is " in asked[0].asked


def test_examples_from_another_file(tmp_path: Path, pens: Path) -> None:
    other = write(tmp_path / "examples.jsonl", word_problems(5, start=90))
    made = task(pens, shots=2, shots_path=str(other))
    assert "Ada has 90 pens" in made.item(0, 0).asked
    assert "Ada has 91 pens" in made.item(0, 0).asked
    assert "Ada has 92 pens" not in made.item(0, 0).asked
    assert len({made.item(0, index).question for index in range(40)}) == 40
    with pytest.raises(UserError, match=r"examples\.jsonl has 5 rows and shots is 9; take fewer"):
        task(pens, shots=9, shots_path=str(other))
    with pytest.raises(UserError, match="shots_path without shots: say how many"):
        task(pens, shots_path=str(other))
    with pytest.raises(UserError, match="has 40 rows and shots is 40; take fewer"):
        task(pens, shots=40)


# ---- worked solutions, lineage, recipes ----


def test_a_rows_own_solution_is_taught(pens: Path) -> None:
    item = task(pens).item(0, 0)
    messages = solution_conversation(item, "tag", "Please: {question}", "Think.")
    assert messages is not None
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == f"Please: {item.question}"
    assert messages[2]["content"] == (
        f"<think>{item.metadata['solution']}</think>\n\n<answer>{item.answer}</answer>"
    )
    assert (solution_text(item) or "").endswith(f"The answer is {item.answer}\n")


def test_the_lineage_has_the_files_hash(pens: Path) -> None:
    assert task(pens).origins() == [
        {"source": str(pens), "sha256": {"pens.jsonl": sha256(pens)}, "license": None}
    ]


def test_a_table_is_read_once_until_its_file_changes(pens: Path) -> None:
    first = table(str(pens), Columns(), "t")
    assert table(str(pens), Columns(), "t") is first
    write(pens, word_problems(41))
    assert len(table(str(pens), Columns(), "t")) == 41


def test_a_recipe_names_its_data_in_full(tmp_path: Path, pens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = {"kind": "grpo", "steps": 1, "tasks": {"mine": {"path": "pens.jsonl", "question": "{question}"}}}
    recipe = validate({"name": "t", "base": "b", "stages": [stage]})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    monkeypatch.chdir("/")
    assert load(tmp_path / "recipe.yaml") == recipe
    assert f"path: {pens}" in dump(recipe)


@pytest.mark.parametrize("name", ["mine", "aime24", "gsm8k"])
def test_the_rewards_of_data_withstand_the_audit(tmp_path: Path, pens: Path, name: str) -> None:
    if name == "aime24":
        write(pens, [{"problem": f"What is {n} + 2?", "answer": n + 2} for n in range(30)])
    tasks = {name: {"path": str(pens)}}
    with VerifierPool(workers=1) as pool:
        found = audit(Mixture(tasks, 0), "final", pool)
    assert [case["case"] for case in found["cases"] if not case["passed"]] == []
