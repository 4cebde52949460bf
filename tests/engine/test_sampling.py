"""Sampling: frequencies, truncation, and log-probabilities of the distribution before truncation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.engine import Sampling
from farthing.engine.sampling import Row, adjust, choose, truncate, uniforms


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
        {"frequency_penalty": 2.5},
        {"presence_penalty": -2.5},
        {"repetition_penalty": 0},
        {"logit_bias": ((3, 101.0),)},
        {"top_logprobs": 21},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).split("_")[0]):
        Sampling(**wrong)


LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def scores(row):
    """The logits that a row is drawn from."""
    return adjust(LOGITS.clone(), [row])[0]


def test_penalties_follow_their_formulas():
    tokens = {"prompt": [0, 3], "completion": [1, 1, 3]}
    frequent = scores(Row(Sampling(frequency_penalty=0.5), 0.0, **tokens))
    assert frequent.tolist() == [2.0, 0.0, 0.5, -1.5, -3.0]
    present = scores(Row(Sampling(presence_penalty=-0.5), 0.0, **tokens))
    assert present.tolist() == [2.0, 1.5, 0.5, -0.5, -3.0]
    repeated = scores(Row(Sampling(repetition_penalty=2.0), 0.0, **tokens))
    assert repeated.tolist() == [1.0, 0.5, 0.5, -2.0, -3.0]
    biased = scores(Row(Sampling(logit_bias=((4, 100.0), (0, -2.0), (4, 1.0))), 0.0))
    assert biased.tolist() == [0.0, 1.0, 0.5, -1.0, 98.0]


def test_adjusted_rows_beside_plain_ones_keep_the_policys_log_probabilities():
    mask = np.array([0b11000], np.int32)
    rows = [
        Row(Sampling(temperature=0), 0.0),
        Row(Sampling(temperature=0), 0.0, mask=mask),
        Row(Sampling(temperature=0, logit_bias=((2, 50.0),)), 0.0),
        Row(Sampling(temperature=0, presence_penalty=2.0), 0.0, completion=[0, 1]),
        Row(Sampling(temperature=2.0, logit_bias=((4, 100.0),)), 0.5),
        Row(Sampling(top_p=0.5), 0.99, mask=mask),
    ]
    chosen = choose(LOGITS.repeat(len(rows), 1), rows)
    assert chosen.ids == [0, 3, 2, 2, 4, 3]
    cold, warm = LOGITS[0].log_softmax(-1), (LOGITS[0] / 2).log_softmax(-1)
    expected = [cold[0], cold[3], cold[2], cold[2], warm[4], cold[3]]
    torch.testing.assert_close(chosen.logprobs, [float(x) for x in expected], atol=1e-6, rtol=0)


def test_the_likeliest_tokens_are_recorded_where_asked_for():
    rows = [Row(Sampling(top_logprobs=count, temperature=0.5), 0.9) for count in (0, 2, 20)]
    chosen = choose(LOGITS.repeat(3, 1), rows)
    expected = (LOGITS[0] / 0.5).log_softmax(-1)
    assert [[token for token, _ in row] for row in chosen.top] == [[], [0, 1], [0, 1, 2, 3, 4]]
    torch.testing.assert_close([x for _, x in chosen.top[2]], expected.tolist(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_rows_truncated_together_equal_a_full_sort_of_each(spread):
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(40, 1500, generator=generator, dtype=torch.float64) * spread).exp().float()
    draw = np.random.default_rng(0)
    samplings = [
        Sampling(top_k=int(k), top_p=float(p), min_p=float(m))
        for k, p, m in zip(
            draw.choice([0, 1, 7, 200, 4000], 40), draw.choice([0.1, 0.6, 0.95, 1.0], 40),
            draw.choice([0.0, 0.02, 0.5], 40), strict=True,
        )
    ]  # fmt: skip
    expected = weights.clone()
    for row, sampling in zip(expected, samplings, strict=True):
        ordered = row.sort(descending=True).values
        if 0 < sampling.top_k < len(row):
            row[row < ordered[sampling.top_k - 1]] = 0
        if sampling.top_p < 1:
            ordered = row.sort(descending=True).values.double()
            before = ordered.cumsum(0) - ordered
            row[row < ordered[before < sampling.top_p * ordered.sum()][-1]] = 0
        row[row < sampling.min_p * row.max()] = 0
    assert torch.equal(truncate(weights, samplings), expected)
