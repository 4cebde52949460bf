"""Log-likelihoods of continuations, against the definition: the whole sequence by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.evaluate import likelihood
from farthing.evaluate.likelihood import likelihoods
from farthing.model import Decoder
from farthing.weights import decoder_config

LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": True,
}  # fmt: skip
IDS = st.lists(st.integers(0, 49), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(decoder_config(LLAMA))
    made.init_weights(seed=3, std=0.3)
    return made.eval()


@torch.no_grad()
def by_itself(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    logits = decoder(ids)[0, len(context) - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return float(chosen.sum()), logits.argmax(-1).tolist() == continuation


@given(st.lists(st.tuples(st.lists(IDS, min_size=1, max_size=3), IDS), min_size=1, max_size=5))
@settings(max_examples=25)
def test_each_is_as_if_it_were_alone(
    decoder: Decoder, asked: list[tuple[list[list[int]], list[int]]]
) -> None:
    pairs = [(context, each) for continuations, context in asked for each in continuations]
    told: list[tuple[int, int]] = []
    found, work = likelihoods(decoder, pairs, lambda done, of: told.append((done, of)))
    for each, (context, continuation) in zip(found, pairs, strict=True):
        logprob, greedy = by_itself(decoder, context, continuation)
        assert each.logprob == pytest.approx(logprob, abs=1e-4)
        assert each.greedy == greedy
    assert told[-1] == (len(pairs), len(pairs))
    assert work.scored_tokens == sum(len(continuation) for _, continuation in pairs)


def test_the_greedy_continuation_is_known(decoder: Decoder) -> None:
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    (right, wrong), _ = likelihoods(decoder, [(ids[:3], ids[3:]), (ids[:3], [*ids[3:5], (ids[5] + 1) % 50])])
    assert right.greedy
    assert not wrong.greedy
    assert right.logprob > wrong.logprob


def test_a_context_is_read_once_and_passes_stay_small(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [([5, 6, 7, 8], [n, n + 1]) for n in range(20)]
    whole, work = likelihoods(decoder, pairs)
    assert work.computed_tokens == 4 + 20
    monkeypatch.setattr(likelihood, "PASS_TOKENS", 12)
    monkeypatch.setattr(likelihood, "ROWS_AT_ONCE", 3)
    parts, work = likelihoods(decoder, pairs)
    assert [each.logprob for each in parts] == pytest.approx([each.logprob for each in whole], abs=1e-5)
    assert work.computed_tokens > 4 + 20


def test_a_long_context_loses_its_beginning(decoder: Decoder) -> None:
    context = [n % 50 for n in range(60)]
    [found], _ = likelihoods(decoder, [(context, [3, 4])])
    assert found.logprob == pytest.approx(by_itself(decoder, context[-23:], [3, 4])[0], abs=1e-4)


@pytest.mark.parametrize(
    ("context", "continuation", "said"),
    [([], [1], "empty"), ([1], [], "empty"), ([1], [2] * 25, "25 tokens, but the model has 24")],
)
def test_what_cannot_be_scored_is_refused(
    decoder: Decoder, context: list[int], continuation: list[int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        likelihoods(decoder, [(context, continuation)])


def test_latent_attention_and_experts_alike(small_deepseek: Callable[..., Any]) -> None:
    decoder, _ = small_deepseek()
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([9, 8], [7, 6, 5])]
    found, _ = likelihoods(decoder, pairs)
    for each, pair in zip(found, pairs, strict=True):
        assert each.logprob == pytest.approx(by_itself(decoder, *pair)[0], abs=1e-4)
