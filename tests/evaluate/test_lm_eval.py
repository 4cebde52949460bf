"""lm-evaluation-harness through our engine: the scores of its own transformers backend, on local data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'farthing[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from farthing.base.errors import UserError
from farthing.evaluate.lm_eval import Farthing

PLACES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Tokyo"]
LANDS = ["France", "Italy", "Norway", "Peru", "Egypt", "Japan"]
TASKS = {
    "capitals": """\
        task: capitals
        output_type: multiple_choice
        doc_to_text: "The capital of {{land}} is"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{gold}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "counting": """\
        task: counting
        output_type: generate_until
        doc_to_text: "{{said}}"
        doc_to_target: "{{wanted}}"
        generation_kwargs: {until: ["\\n", "8"], max_gen_toks: 10}
        metric_list: [{metric: exact_match}]
        """,
    "prose": """\
        task: prose
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{prose}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "land": land, "choices": [" " + place for place in PLACES], "gold": number,
            "said": " ".join(map(str, range(1, number + 3))) + " ", "wanted": f"{number + 3} {number + 4}",
            "prose": f"The road to {place} is long, " * (1 + number * 8) + f"and {land} is wide.",
        }
        for number, (land, place) in enumerate(zip(LANDS, PLACES, strict=True))
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        body = "\n".join(line.strip() for line in text.splitlines())
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(body + data + "test_split: test\nnum_fewshot: 0\n")
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(model: str, args: dict[str, Any], tasks: TaskManager) -> tuple[dict[str, Any], dict[str, Any]]:
    done = simple_evaluate(
        model, model_args=args, tasks=list(TASKS), task_manager=tasks, batch_size=2, device="cpu", bootstrap_iters=0,
        verbosity="ERROR",
    )  # fmt: skip
    numbers = {
        f"{task} {name.partition(',')[0]}": value
        for task, found in done["results"].items()
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name
    }
    samples = {task: [one["resps"] for one in lines] for task, lines in done["samples"].items()}
    return numbers, samples


def agree(folder: Path, tasks: TaskManager, nats: float) -> None:
    theirs, said = scores("hf", {"pretrained": str(folder), "dtype": "float32"}, tasks)
    ours, wrote = scores("farthing", {"path": str(folder), "dtype": "float32"}, tasks)
    assert ours.keys() == theirs.keys()
    assert {
        "capitals acc",
        "capitals acc_norm",
        "counting exact_match",
        "prose word_perplexity",
    } <= ours.keys()
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert wrote["counting"] == said["counting"]
    for one, other in zip(wrote["capitals"], said["capitals"], strict=True):
        assert [each[0][1] for each in one] == [each[0][1] for each in other]  # whether it is greedy
        assert [each[0][0] for each in one] == pytest.approx([each[0][0] for each in other], abs=nats)


def test_a_small_model_scores_as_with_transformers(tiny_model: Path, tasks: TaskManager) -> None:
    agree(tiny_model, tasks, 1e-3)


@pytest.mark.slow
def test_smollm2_scores_as_with_transformers(smollm2: Path, tasks: TaskManager) -> None:
    agree(smollm2, tasks, 2e-3)


def test_the_harness_knows_the_model_and_is_told_what_is_missing(tiny_model: Path) -> None:
    assert get_model("farthing") is Farthing
    with pytest.raises(UserError, match="path=FOLDER"):
        Farthing()
    model = Farthing(path=str(tiny_model))
    request = type("Request", (), {"args": ("1 2", {"until": ["x"], "num_beams": 4})})
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until([request])
    request.args = ("1 2", {"until": ["x"], "max_gen_toks": 256})
    with pytest.raises(UserError, match="has 256 positions"):
        model.generate_until([request])


def test_the_chat_template_is_the_models(tiny_model: Path) -> None:
    model = Farthing(path=str(tiny_model))
    asked = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(asked) == "<|user|>hi<|assistant|>"
    begun = [*asked, {"role": "assistant", "content": "well"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "<|user|>hi<|assistant|>well"


@pytest.mark.slow
def test_the_command_is_the_harness_with_one_model_more(
    tiny_model: Path, tasks: TaskManager, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "farthing.evaluate.lm_eval", "--model", "farthing", "--model_args",
            f"path={tiny_model}", "--tasks", "capitals", "--include_path", str(tasks.include_path),
            "--output_path", str(tmp_path), "--limit", "3",
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "capitals" in done.stdout
