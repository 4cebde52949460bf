"""The real SmolLM2-135M-Instruct against transformers, both in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from farthing.engine import Engine, Model, Request, Sampling

NEW = 16
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 5, 8, 13,",
    "Water boils at a temperature of",
    "The three primary colours are red,",
    "In 1969, the first",
    "Dear Sir or Madam,\n\nI am writing to",
    "E = mc",
    "Zwei Dinge sind unendlich:",
    "La Révolution française commença en",
    "日本の首都は",
    "To make an omelette, first break",
    "SELECT name FROM users WHERE",
    "The opposite of hot is",
    "Shakespeare wrote",
]
QUESTIONS = ["What is gravity?", "Write a haiku about rain.", "What is 12 + 30?", "Name three planets."]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Model:
    return Model(smollm2, dtype=torch.float32)


def load_theirs(folder: Path) -> Any:
    """Load a folder in transformers in float32 and check that every tensor was used."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind]
    return model.eval()


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return load_theirs(smollm2)


@pytest.fixture(scope="module")
def prompts(ours: Model) -> list[list[int]]:
    """Twenty prompts: sixteen plain texts and four conversations."""
    chats = [ours.tokenizer.chat_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [ours.tokenizer.encode(text) for text in PROMPTS] + chats


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], stops: frozenset[int]) -> list[list[int]]:
    """transformers' own generation, in one padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


@torch.no_grad()
def test_logits_equal_transformers(
    ours: Model, theirs: Any, prompts: list[list[int]], plain_torch: None
) -> None:
    for ids in prompts[:16:3]:
        batch = torch.tensor([ids])
        expected = theirs(batch).logits
        assert float(expected.abs().max()) > 5
        torch.testing.assert_close(ours.logits(batch), expected, atol=1e-4, rtol=0)
    # Rounding is larger in the template's system message: transformers' own attention kernels (sdpa, eager) differ
    # there by 0.9e-4 from each other, and by 0.8e-4 and 1.3e-4 from float64.
    batch = torch.tensor([prompts[-1]])
    torch.testing.assert_close(ours.logits(batch), theirs(batch).logits, atol=3e-4, rtol=0)


@torch.no_grad()
def test_fast_paths_differ_only_by_rounding(ours: Model, theirs: Any, prompts: list[list[int]]) -> None:
    for ids in prompts[::4]:
        batch = torch.tensor([ids])
        expected = theirs(batch).logits
        error = (ours.logits(batch) - expected).abs().max() / expected.abs().max()
        assert float(error) < 2e-5


def test_greedy_answers_equal_transformers_in_a_mixed_batch(
    ours: Model, theirs: Any, prompts: list[list[int]]
) -> None:
    stops = ours.tokenizer.stop_ids
    expected = greedy(theirs, prompts, stops)
    requests = [Request(ids, Sampling(max_new_tokens=NEW, temperature=0)) for ids in prompts]
    # sequences join and leave while others run
    engine = Engine(ours.decoder, stops, max_batch=7, cache_tokens=2048)
    got = [sample.ids for (sample,) in engine.generate(requests)]
    assert len({len(ids) for ids in prompts}) > 5
    for prompt, mine, want in zip(prompts, got, expected, strict=True):
        assert mine == want, ours.tokenizer.decode(prompt)


@torch.no_grad()
def test_a_saved_folder_is_the_same_model_to_transformers(
    ours: Model, theirs: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder = ours.save(tmp_path / "saved")
    saved = load_theirs(folder)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter), name
    few, stops = prompts[::6], ours.tokenizer.stop_ids
    assert greedy(saved, few, stops) == greedy(theirs, few, stops)
