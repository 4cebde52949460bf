"""The losses against their definitions, written out the plain way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farthing.base.device import Alone
from farthing.train import losses
from farthing.train.losses import (
    advantages,
    clipped_objective,
    k3,
    k3_corrected,
    token_logprobs,
    token_weights,
)

VOCAB, WIDTH = 37, 8


def problem(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden states, head, targets, a gradient from above)."""
    draw = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=draw).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, WIDTH, generator=draw).to(dtype).requires_grad_()
    return (
        hidden,
        head,
        torch.randint(0, VOCAB, (tokens,), generator=draw),
        torch.randn(tokens, generator=draw),
    )


def plain(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, softcap: float | None = None
) -> Tensor:
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_logprobs_and_gradients_equal_log_softmax(
    monkeypatch: pytest.MonkeyPatch, rows_a_chunk: int, temperature: float, softcap: float | None
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BYTES", rows_a_chunk * 4 * VOCAB)
    hidden, head, targets, above = problem(17)
    expected = plain(hidden, head, targets, temperature, softcap)
    want = torch.autograd.grad(expected, (hidden, head), above)
    got = token_logprobs(hidden, head, targets, temperature, softcap)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for mine, theirs in zip(torch.autograd.grad(got, (hidden, head), above), want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_token_logprobs_gradient_equals_finite_differences() -> None:
    hidden, head, targets, above = problem(3)
    (grad,) = torch.autograd.grad(token_logprobs(hidden, head, targets, 1.3), hidden, above)
    with torch.no_grad():
        for row in range(3):
            for column in range(WIDTH):
                step = torch.zeros_like(hidden)
                step[row, column] = 1e-2
                up, down = (token_logprobs(hidden + s, head, targets, 1.3) for s in (step, -step))
                slope = float(((up - down) * above).sum()) / 2e-2
                assert slope == pytest.approx(float(grad[row, column]), abs=2e-3)


def test_token_logprobs_of_a_weight_used_twice_adds_both_gradients() -> None:
    _, head, targets, above = problem(9)
    ids = torch.arange(9)
    tied = [
        torch.autograd.grad(f(head[ids], head, targets, 1.0), head, above)[0] for f in (plain, token_logprobs)
    ]
    torch.testing.assert_close(tied[1], tied[0], atol=2e-5, rtol=1e-5)


def test_token_logprobs_in_bfloat16_stay_close_to_float32() -> None:
    hidden, head, targets, above = problem(29, torch.bfloat16)
    wide, wide_head = (t.detach().float().requires_grad_() for t in (hidden, head))
    expected = plain(wide, wide_head, targets, 0.8)
    got = token_logprobs(hidden, head, targets, 0.8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.06, rtol=0)
    want = torch.autograd.grad(expected, (wide, wide_head), above)
    for mine, theirs in zip(torch.autograd.grad(got, (hidden, head), above), want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.float() - theirs).norm() / theirs.norm()) < 0.02


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative(logprob: float, reference: float) -> None:
    estimate = k3(
        torch.tensor([logprob], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    )
    assert float(estimate) >= 0 or float(estimate) == pytest.approx(0, abs=1e-12)
    if abs(logprob - reference) > 1e-3:
        assert float(estimate) > 1e-7


@given(st.floats(-30, 0))
def test_k3_is_zero_where_the_two_agree(logprob: float) -> None:
    same = torch.tensor([logprob])
    assert float(k3(same, same)) == 0


def test_k3_averages_to_the_divergence() -> None:
    draw = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 20, generator=draw).log_softmax(-1)
    true = float((policy.exp() * (policy - reference)).sum())
    backwards = float((reference.exp() * (reference - policy)).sum())
    sampled = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=draw)
    mean = float(k3(policy[sampled], reference[sampled]).mean())
    assert mean == pytest.approx(true, rel=0.02)
    assert abs(backwards - true) > 0.04 * true  # so the direction is told apart


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL between two categorical distributions, over all outcomes, given as log-probabilities."""
    return (one.exp() * (one - other)).sum()


def of_logits(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@given(st.integers(0, 1000), st.integers(2, 9), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_corrected_estimator_and_its_gradient_are_those_of_the_divergence(
    seed: int, outcomes: int, spread: float
) -> None:
    """Every outcome is counted with its probability, so nothing here is drawn."""
    draw = torch.Generator().manual_seed(seed)
    logits, theirs, sampler = (
        spread * torch.randn(outcomes, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), theirs.log_softmax(0)
    true = divergence(policy, reference)
    for old in (policy.detach(), sampler.log_softmax(0)):  # the policy itself, and another before its updates
        expected = (old.exp() * k3_corrected(policy, old, reference)).sum()
        torch.testing.assert_close(expected, true, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of_logits(expected, logits), of_logits(true, logits), rtol=1e-7, atol=1e-9)
    # k3 itself: the value is right for the policy's own samples, the gradient is that of the other direction
    plain = (policy.detach().exp() * k3(policy, reference)).sum()
    torch.testing.assert_close(plain, true, rtol=1e-9, atol=1e-12)
    other = of_logits(divergence(reference, policy), logits)
    torch.testing.assert_close(of_logits(plain, logits), other, rtol=1e-7, atol=1e-9)


def test_the_gradient_of_k3_has_no_bound_where_the_policy_has_left_the_reference() -> None:
    reference = torch.tensor([-1.0])
    for logprob in (-5.0, -10.0, -20.0):
        policy = torch.tensor([logprob], requires_grad=True)
        (plain,) = torch.autograd.grad(k3(policy, reference), policy)
        (corrected,) = torch.autograd.grad(k3_corrected(policy, policy.detach(), reference), policy)
        ratio = -1.0 - logprob  # log(reference / policy)
        torch.testing.assert_close(plain, 1 - torch.tensor([ratio]).exp())
        torch.testing.assert_close(corrected, torch.tensor([-ratio]), rtol=1e-4, atol=1e-4)


def plain_objective(ratio: float, advantage: float, low: float, high: float) -> tuple[float, bool]:
    """PPO's surrogate by cases: a good token gains nothing above 1 + high, a bad one nothing below 1 -
    low."""
    if advantage > 0 and ratio > 1 + high:
        return (1 + high) * advantage, True
    if advantage < 0 and ratio < 1 - low:
        return (1 - low) * advantage, True
    return ratio * advantage, False


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-4, 4), st.floats(0.05, 0.9), st.floats(0.05, 9))
def test_clipped_objective_equals_its_cases(
    logprob: float, old: float, advantage: float, low: float, high: float
) -> None:
    new, before, gain = (torch.tensor([x], dtype=torch.float64) for x in (logprob, old, advantage))
    objective, held = clipped_objective(new, before, gain, low, high)
    ratio = float((torch.tensor(logprob, dtype=torch.float64) - old).exp())
    expected, is_held = plain_objective(ratio, advantage, low, high)
    assert float(objective) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if abs(expected - ratio * advantage) > 1e-12:  # at the very edge rounding decides
        assert bool(held) == is_held


def test_clip_higher_lets_a_good_token_rise_further_than_a_bad_one_may_fall() -> None:
    ratios, good = torch.tensor([1.25, 1.35, 0.75, 0.65]), torch.ones(4)
    for advantage, free in ((good, [True, False, True, True]), (-good, [True, True, True, False])):
        logprobs = ratios.log().requires_grad_()
        objective, held = clipped_objective(logprobs, torch.zeros(4), advantage, 0.3, 0.28)
        assert held.tolist() == [not f for f in free]
        (grad,) = torch.autograd.grad(objective.sum(), logprobs)
        torch.testing.assert_close(grad, ratios * advantage * torch.tensor(free))


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages(rewards, "mean"), centred)
    third = 3**0.5
    divided = torch.tensor(
        [[third, -1 / third, -1 / third, -1 / third], [1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(advantages(rewards, "std"), divided, atol=1e-5, rtol=0)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@given(lengths)
def test_token_weights_add_up_as_promised(lengths: list[int]) -> None:
    by_token = token_weights(lengths, "token", 40, Alone("cpu"))
    assert len(set(by_token)) == 1
    assert sum(w * n for w, n in zip(by_token, lengths, strict=True)) == pytest.approx(1)
    by_sample = token_weights(lengths, "sample", 40, Alone("cpu"))
    for weight, length in zip(by_sample, lengths, strict=True):
        assert weight * length == pytest.approx(1 / len(lengths))
    constant = token_weights(lengths, "constant", 40, Alone("cpu"))
    assert constant == [1 / (40 * len(lengths))] * len(lengths)


@pytest.mark.parametrize("kind", ["token", "sample", "constant"])
def test_no_answers_have_no_weights(kind: str) -> None:
    assert token_weights([], kind, 40, Alone("cpu")) == []
