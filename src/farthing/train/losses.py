"""Log-probabilities of given tokens without ever holding the [tokens, vocabulary] matrix, and the GRPO loss
on them.

Shapes: M tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farthing.base.device import Ranks
from farthing.base.sizes import LOGIT_BYTES
from farthing.model.kernels import cross_entropy, logprobs


class _TokenLogprobs(torch.autograd.Function):
    """Keeps only the hidden states; the backward pass recomputes the logits, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.softcap = temperature, softcap
        pieces = [
            _logits(hidden[part], weight, temperature, softcap)
            .log_softmax(-1)
            .gather(1, targets[part, None])[:, 0]
            for part in _chunks(len(targets), weight)
        ]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        temperature, softcap = ctx.temperature, ctx.softcap
        grad = grad / temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for part in _chunks(len(targets), weight):
            # d logp / d logits = onehot(target) - softmax
            logits = _logits(hidden[part], weight, temperature, softcap)
            change = logits.softmax(-1).mul_(-grad[part, None])
            change.scatter_add_(1, targets[part, None], grad[part, None])
            if softcap is not None:  # tanh' = 1 - tanh^2
                change *= 1 - (logits * (temperature / softcap)).square()
            narrow = change.to(weight.dtype)
            grad_hidden[part] = narrow @ weight
            if ctx.needs_input_grad[1]:
                product = narrow.T @ hidden[part]
                grad_weight = product if grad_weight is None else product.float().add_(grad_weight)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(count: int, weight: Tensor) -> list[slice]:
    size = max(1, LOGIT_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """float32 scores, rounded on the way as the sampler's are (`Decoder.logits`, then the temperature)."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprobs(
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log p(target) under softmax(hidden @ head.T / temperature), [M] float32, differentiable in hidden and
    head. A `softcap` bounds the scores before the temperature, as in `Decoder.logits`."""
    if logprobs.KERNEL.on(hidden_MC):
        return logprobs.logprobs(hidden_MC, head_VC, targets_M, temperature, softcap, LOGIT_BYTES)
    return _TokenLogprobs.apply(hidden_MC, head_VC, targets_M, temperature, softcap)


def next_token_losses(
    hidden_MC: Tensor, head_VC: Tensor, targets_M: Tensor, softcap: float | None = None
) -> Tensor:
    """-log p(target) for each row, [M] float32 nats.

    torch's fused loss keeps the logits for the backward pass, which is faster while they are few; otherwise, and
    without that kernel, they are computed twice.
    """
    few = len(targets_M) * head_VC.shape[0] * head_VC.element_size() <= LOGIT_BYTES
    if not logprobs.KERNEL.on(hidden_MC) and few and softcap is None and cross_entropy.KERNEL.on(hidden_MC):
        return cross_entropy.fused(hidden_MC, head_VC, targets_M).float()
    return -token_logprobs(hidden_MC, head_VC, targets_M, softcap=softcap)


def k3(logprobs_M: Tensor, reference_M: Tensor) -> Tensor:
    """An unbiased, never negative estimate of KL(policy || reference) for each sampled token, [M]:
    r - log r - 1 with r = reference / policy (Schulman, "Approximating KL divergence", 2020; DeepSeekMath
    arXiv:2402.03300 eq. 4)."""
    log_ratio = reference_M - logprobs_M
    return log_ratio.exp() - log_ratio - 1


def k3_corrected(logprobs_M: Tensor, old_M: Tensor, reference_M: Tensor) -> Tensor:
    """k3 times the ratio of the policy to the one that sampled, [M] (DeepSeek-V3.2, arXiv:2512.02556 section 3.1).

    Both the value and the gradient are then those of KL(policy || reference). The gradient of k3 itself is that of
    KL(reference || policy), whose weight reference / policy has no bound where the policy has left the reference, and
    after the first of several updates its value is off too.
    """
    ratio = (logprobs_M - old_M).exp()
    # the same written so that no large terms cancel in the gradient: ratio * reference / policy is a constant
    return (reference_M - old_M).exp() - ratio * (reference_M - logprobs_M + 1)


def clipped_objective(
    logprobs_M: Tensor, old_M: Tensor, advantages_M: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate for each token (arXiv:2402.03300 eq. 3), with an upper bound of its own
    (clip-higher, DAPO arXiv:2503.14476 section 3.1).

    Returns:
        the objective [M], to be maximised; whether the clip binds, [M] bool.
    """
    ratio = (logprobs_M - old_M).exp()
    free = ratio * advantages_M
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages_M
    return torch.minimum(free, held), held < free


def advantages(rewards_PG: Tensor, kind: str) -> Tensor:
    """Advantage of each sample over its group, [P, G] float32.

    `std`: (r - mean) / std, as DeepSeek defined GRPO (arXiv:2402.03300 section 4.1.2). `mean`: r - mean;
    dividing by the deviation favours questions that are almost always or almost never solved (Dr. GRPO,
    arXiv:2503.20783).
    """
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if kind == "mean":
        return centred
    return centred / (rewards_PG.std(1, correction=0, keepdim=True) + 1e-6)


def token_weights(lengths: list[int], kind: str, max_new_tokens: int, ranks: Ranks) -> list[float]:
    """The weight of every token of each of this rank's samples in the loss of the whole batch.

    `token`: tokens count equally (DAPO arXiv:2503.14476 section 3.3). `sample`: samples count equally, whatever their
    length (arXiv:2402.03300). `constant`: divided by the longest length allowed, so length does not matter (Dr.
    GRPO arXiv:2503.20783).
    """
    tokens, samples = ranks.total(sum(lengths)), ranks.total(len(lengths))
    if kind == "token":
        return [1 / tokens for _ in lengths]
    if kind == "sample":
        return [1 / (length * samples) for length in lengths]
    return [1 / (max_new_tokens * samples) for _ in lengths]
