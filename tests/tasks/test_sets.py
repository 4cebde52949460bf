"""Question sets by name: each reads rows of its own columns, and asks as those who publish scores on it do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.text import hub_name
from farthing.recipe import TaskSetting
from farthing.tasks import table as tables
from farthing.tasks.data import DataTask
from farthing.tasks.mixture import Mixture
from farthing.tasks.sets import SETS
from farthing.tasks.verify import verify


def gsm8k(n: int) -> dict[str, Any]:
    return {
        "question": f"{n} pens and 2 more?",
        "answer": f"{n} + 2 = <<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}",
    }


def math(n: int) -> dict[str, Any]:
    return {
        "problem": f"What is ${n}^2$?",
        "solution": f"$\\boxed{{{n * n}}}$",
        "answer": f"{n * n}",
        "level": 1,
    }


def arc(n: int) -> dict[str, Any]:
    return {"id": f"{n}", "question": f"Which is number {n}?", "answerKey": "AB12"[n % 4],
            "choices": {"text": [f"number {n}", "no number"], "label": ["12", "AB"][n % 4 < 2]}}  # fmt: skip


def mmlu(n: int) -> dict[str, Any]:
    subject = ["high_school_physics", "anatomy"][n % 2]
    return {
        "question": f"Which {n}?",
        "subject": subject,
        "choices": [f"w{n}", "x", "y", "z"],
        "answer": n % 4,
    }


def hellaswag(n: int) -> dict[str, Any]:
    return {"activity_label": "Baking", "ctx_a": f"[header] How to bake {n} loaves [title] Mix.", "ctx_b": "the baker",
            "endings": ["kneads  it.", "sings [step] on.", "sleeps.", "leaves."], "label": str(n % 4)}  # fmt: skip


def humaneval(n: int) -> dict[str, Any]:
    return {"task_id": f"HumanEval/{n}", "prompt": f"def add{n}(a):\n    ", "canonical_solution": f"return a + {n}",
            "test": f"def check(f):\n    assert f(1) == {n + 1}", "entry_point": f"add{n}"}  # fmt: skip


def mbpp(n: int) -> dict[str, Any]:
    return {"task_id": n, "text": f"Write a function that adds {n}.", "code": f"def add(a):\n    return a + {n}",
            "test_list": [f"assert add(1) == {n + 1}", f"assert add(2) == {n + 2}"], "test_setup_code": ""}  # fmt: skip


def ifeval(n: int) -> dict[str, Any]:
    return {"key": n, "prompt": f"Write {n} lines, without commas.", "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}]}  # fmt: skip


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "gsm8k": gsm8k, "math500": math, "aime24": math, "aime25": math, "arc": arc, "arc_challenge": arc,
    "arc_easy": arc, "mmlu": mmlu, "hellaswag": hellaswag, "humaneval": humaneval, "mbpp": mbpp, "ifeval": ifeval,
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the hub: 60 rows in a test split, 60 others in a training split, 12 further ones elsewhere."""
    asked: list[str] = []

    def rows(source: str) -> Any:
        asked.append(source)
        split = hub_name(source).split
        name = next(
            name for name, known in SETS.items() if hub_name(known.source).name == hub_name(source).name
        )
        start, count = {"train": (100, 60), "dev": (200, 12), "prompt": (1, 10)}.get(split, (0, 60))
        return ((ROWS[name](n), f"{source}:{n}") for n in range(start, start + count))

    monkeypatch.setattr("farthing.data.text._hub_rows", rows)
    monkeypatch.setattr(tables, "_TABLES", type(tables._TABLES)())
    return asked


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_asked_from_the_hub_as_its_note_says(name: str, hub: list[str]) -> None:
    made = DataTask(name, TaskSetting())
    known = SETS[name]
    assert hub[0] == known.source
    items = list(made.held_out())
    assert {item.question for item in items}.isdisjoint(
        {made.item(0, index).question for index in range(60)}
        if known.train and known.train != known.source
        else ()
    )
    item = items[0]
    assert [part["use"] for part in item.metadata["rewards"]] == [part.use for part in known.reward]
    assert item.metadata["row"].items() >= {"question": item.question}.items() or item.question
    blocks = item.asked.split("\n\n")
    assert len(blocks) >= known.shots
    assert json.loads(json.dumps(dict(item.metadata))) == item.metadata
    assert "arXiv" in known.note or "Mathematics Examination" in known.note


@pytest.mark.parametrize("name", SETS)
def test_a_path_puts_a_file_of_the_same_columns_in_its_place(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROWS[name](n)) + "\n" for n in range(60)))
    made = DataTask(name, TaskSetting(path=str(path)))
    asked = {made.item(0, index).question for index in range(len(made.questions) - SETS[name].shots)}
    assert len(asked) == len(made.questions) - SETS[name].shots
    with_none = DataTask(name, TaskSetting(path=str(path), shots=0)).item(0, 0)
    assert len(with_none.asked) < len(made.item(0, 0).asked) or not SETS[name].shots


def one(name: str, **keys: Any) -> Any:
    return next(DataTask(name, TaskSetting(**keys)).held_out())


def test_gsm8k_shows_five_solutions_without_the_calculators_notes(hub: list[str]) -> None:
    item = one("gsm8k")
    assert item.asked.count("Question: ") == 6
    assert item.asked.count("\n#### ") == 5
    assert "<<" not in item.asked
    assert item.asked.endswith(f"\n\nQuestion: {item.question}\nAnswer:")
    assert item.answer.isdecimal()
    assert one("gsm8k", shots=8).asked.count("\n#### ") == 8
    trained = {DataTask("gsm8k", TaskSetting()).item(0, index).question for index in range(55)}
    assert len(trained) == 55  # five of the sixty are the examples
    assert not any(question in item.asked for question in trained)


def test_mmlu_shows_examples_of_the_questions_own_subject(hub: list[str]) -> None:
    item = one("mmlu")
    about = item.metadata["row"]["subject"].replace("_", " ")
    assert item.asked.startswith(
        f"The following are multiple choice questions (with answers) about {about}.\n\nWhich"
    )
    shown = item.asked.split("\n\n")[1:-1]
    assert len(shown) == 5
    parity = int(item.question.split()[1].rstrip("?").splitlines()[0]) % 2
    assert all(int(block.split()[1].rstrip("?")) % 2 == parity for block in shown)
    assert all(block.splitlines()[-1] in {f"Answer: {letter}" for letter in "ABCD"} for block in shown)
    assert item.metadata["likelihood"] == {
        "context": item.asked, "endings": [" A", " B", " C", " D"], "right": "ABCD".index(item.answer),
    }  # fmt: skip


def test_arc_compares_the_options_themselves_and_reads_either_labels(hub: list[str]) -> None:
    items = list(DataTask("arc_easy", TaskSetting(shots=2)).held_out())
    assert {item.answer for item in items} == {"A", "B"}
    likelihood = items[0].metadata["likelihood"]
    stem = items[0].metadata["row"]["question"]
    assert likelihood["context"].endswith(f"\n\nQuestion: {stem}\nAnswer:")
    assert "\nA. " not in likelihood["context"]
    assert likelihood["context"].count("Question: ") == 3
    assert likelihood["endings"] == [f" {option}" for option in items[0].metadata["choices"]]
    assert "\nA. " in items[0].asked


def test_hellaswag_loses_the_marks_of_its_source(hub: list[str]) -> None:
    item = one("hellaswag", shots=0)
    assert item.question.splitlines()[0].startswith("Baking: How to bake ")
    assert item.question.splitlines()[0].endswith("loaves. Mix. The baker")
    assert item.metadata["choices"][:2] == ["kneads it.", "sings on."]
    assert item.metadata["likelihood"]["context"] == item.question.splitlines()[0]
    assert item.metadata["likelihood"]["right"] == int(item.metadata["row"]["label"])


def test_mathematics_is_asked_for_in_a_box(hub: list[str]) -> None:
    for name in ("math500", "aime24", "aime25"):
        item = one(name)
        words = "Please reason step by step, and put your final answer within \\boxed{}."
        assert item.asked == f"{item.question}\n{words}"
        assert item.convention("final") == "boxed"


def test_mbpps_examples_are_problems_2_3_and_4(hub: list[str]) -> None:
    asked = one("mbpp").asked
    assert [f"adds {n}. Your code should pass these tests:\n\nassert" in asked for n in (1, 2, 3, 4, 5)] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert asked.count("[BEGIN]\ndef add(a):") == 3
    assert asked.count("\n[DONE]") == 3
    assert asked.endswith("\n[BEGIN]\n")


def test_humaneval_is_the_functions_head(hub: list[str]) -> None:
    item = one("humaneval")
    assert item.asked == item.question == item.metadata["row"]["prompt"].strip()


def test_a_set_without_a_training_split_does_not_train(hub: list[str]) -> None:
    with pytest.raises(UserError, match="humaneval is for evaluation only"):
        DataTask("humaneval", TaskSetting()).item(0, 0)


def test_all_of_a_test_split_stays_out_of_training(hub: list[str]) -> None:
    mixture = Mixture({"gsm8k": 1}, 0)
    assert len(mixture.never_trained([{"gsm8k": TaskSetting()}])) == 60


def test_the_lineage_of_a_set_has_what_the_hub_says(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing.tasks.data.said_by_hub", lambda source: ("1f2e", "mit"))
    found = DataTask("gsm8k", TaskSetting()).origins()
    assert [entry["source"] for entry in found] == ["hf:openai/gsm8k/main:test", "hf:openai/gsm8k/main:train"]
    assert all((entry["revision"], entry["license"]) == ("1f2e", "mit") for entry in found)
    assert found == DataTask("gsm8k", TaskSetting()).origins()
    assert len(found[0]["sha256"]["rows"]) == 64


def test_an_answer_is_read_up_to_the_next_question_and_in_the_sets_own_form(hub: list[str]) -> None:
    item = one("gsm8k")
    more = f"It is so.\n#### {item.answer}\n\nQuestion: How many now?\nAnswer: 3 + 4\n#### 99"
    assert verify(item, more, "final").outcome == "right"
    assert verify(item, f"#### 98{item.answer}", "final").outcome == "wrong"
    item = one("aime24")
    assert verify(item, f"So \\boxed{{{item.answer}}}.", "final").outcome == "right"
    assert verify(item, f"The answer is {item.answer}", "final").outcome == "unparsed"
    item = one("ifeval")
    assert verify(item, "One line; no more.", "final").outcome == "right"
    assert verify(item, "<think>a, b</think>\nOne line, no more.", "final").outcome == "wrong"
