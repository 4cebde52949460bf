"""lm-evaluation-harness through our engine: the scores of its own transformers backend, on local data."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="pip install 'farthing[lm-eval]'")

from lm_eval.api.registry import get_model

from farthing.base.errors import UserError
from farthing.evaluate.lm_eval import Farthing


def agree(folder: Path, harness: SimpleNamespace, nats: float) -> None:
    theirs, said = harness.scores("hf", {"pretrained": str(folder), "dtype": "float32"}, batch_size=2)
    ours, wrote = harness.scores("farthing", {"path": str(folder), "dtype": "float32"}, batch_size=2)
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


def test_a_small_model_scores_as_with_transformers(tiny_model: Path, harness: SimpleNamespace) -> None:
    agree(tiny_model, harness, 1e-3)


@pytest.mark.slow
def test_smollm2_scores_as_with_transformers(smollm2: Path, harness: SimpleNamespace) -> None:
    agree(smollm2, harness, 2e-3)


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
    tiny_model: Path, harness: SimpleNamespace, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "farthing.evaluate.lm_eval", "--model", "farthing", "--model_args",
            f"path={tiny_model}", "--tasks", "capitals", "--include_path", str(harness.folder),
            "--output_path", str(tmp_path), "--limit", "3",
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "capitals" in done.stdout
