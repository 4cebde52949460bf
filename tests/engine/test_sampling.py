"""Sampling: frequencies, truncation, and log-probabilities of the distribution before truncation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.engine import Sampling
from farthing.engine.sampling import Row, choose, uniforms


def draw(logits, sampling, count=4000):
    rows = [Row(sampling, uniform) for uniform in uniforms(1, 2, count).tolist()]
    chosen = choose(logits.expand(count, -1).clone(), rows)
    return tuple(map(torch.tensor, (chosen.ids, chosen.logprobs, chosen.entropies)))


@pytest.mark.parametrize("size", [7, 511, 513, 1500])
def test_frequencies_follow_the_softmax(size):
    torch.manual_seed(size)
    logits = torch.randn(1, size) * 2
    ids, logprobs, entropy = draw(logits, Sampling())
    expected = logits[0].softmax(-1)
    counted = torch.bincount(ids, minlength=size) / len(ids)
    assert (counted - expected).abs().sum() / 2 < 0.02 + 0.5 * (size / 4000) ** 0.5
    torch.testing.assert_close(logprobs, expected.log()[ids], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[0], -(expected * expected.log()).sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.6), {0, 1}),
        (Sampling(top_p=0.5), {0}),
        (Sampling(min_p=0.5), {0, 1}),
        (Sampling(temperature=0), {0}),
        (Sampling(temperature=0.01), {0}),
    ],
)
def test_truncation_keeps_the_likeliest_and_scores_the_full_distribution(sampling, allowed):
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    ids, logprobs, _ = draw(probabilities.log(), sampling, 500)
    assert set(ids.tolist()) == allowed
    if sampling.temperature == 1.0:
        torch.testing.assert_close(logprobs, probabilities[0].log()[ids], atol=1e-6, rtol=0)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_only_entries_with_positive_weight_are_drawn(uniform, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1100, generator=generator) * 30
    logits[0, torch.rand(1100, generator=generator) < 0.7] = -torch.inf
    logits[0, 600] = 0.0
    chosen = choose(logits.clone(), [Row(Sampling(), uniform)])
    assert np.isfinite(chosen.logprobs).all()
    assert torch.isfinite(logits[0, chosen.ids]).all()


def test_draws_are_keyed_by_seed_and_sample():
    assert np.array_equal(uniforms(3, 1, 5), uniforms(3, 1, 9)[:5])
    assert not np.array_equal(uniforms(3, 1, 5), uniforms(3, 2, 5))
    assert not np.array_equal(uniforms(3, 1, 5), uniforms(4, 1, 5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).split("_")[0]):
        Sampling(**wrong)
