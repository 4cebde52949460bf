"""lm-evaluation-harness over HTTP: its scores are those of the same model in its own process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'farthing[lm-eval]'")

import farthing.evaluate.lm_eval  # noqa: F401 (the harness then knows the model "farthing")

TASKS = ("capitals", "counting", "prose")


@pytest.fixture(scope="module")
def exact(start_server: Any, roomy_model: Path) -> Any:
    """A server that counts in float32, as a comparison wants it."""
    server = start_server(f"tiny={roomy_model}", "--dtype", "float32")
    yield server
    assert "Traceback" not in server.said, server.said[-4000:]
    server.kill()


def of_server(server: Any, folder: Path, backend: str) -> dict[str, Any]:
    """Arguments of the harness's client."""
    tokenizer = {"tokenizer": str(folder)} if backend == "huggingface" else {}
    return {
        "model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": backend, "num_concurrent": 4,
        "max_length": 4096, "max_gen_toks": 10, **tokenizer,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_completions_score_as_in_process(
    exact: Any, roomy_model: Path, harness: SimpleNamespace, backend: str
) -> None:
    ours, wrote = harness.scores("farthing", {"path": str(roomy_model), "dtype": "float32"})
    theirs, said = harness.scores("local-completions", of_server(exact, roomy_model, backend))
    assert ours.keys() == theirs.keys()
    assert "prose word_perplexity" in ours
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert said["counting"] == wrote["counting"]
    for one, other in zip(said["capitals"], wrote["capitals"], strict=True):
        assert [each[0][1] for each in one] == [each[0][1] for each in other]  # whether it is greedy
        assert [each[0][0] for each in one] == pytest.approx([each[0][0] for each in other], abs=1e-4)


def test_chat_answers_as_in_process(exact: Any, roomy_model: Path, harness: SimpleNamespace) -> None:
    asked: dict[str, Any] = {"tasks": ("counting",), "apply_chat_template": True}
    _, wrote = harness.scores("farthing", {"path": str(roomy_model), "dtype": "float32"}, **asked)
    given = {"model": "tiny", "base_url": f"{exact.url}/v1/chat/completions", "max_length": 4096}
    _, said = harness.scores("local-chat-completions", given, **asked)
    assert said["counting"] == wrote["counting"]
