"""From logits to a token: temperature, truncation, and one uniform number per token.

The uniform numbers of a sample come from a counter-based generator keyed by (seed, sample), so a sample does not depend
on the rest of the batch or on interruptions of the run.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farthing.base.errors import UserError

BLOCK = 512  # the cumulative sum is searched in two steps, blocks then entries, instead of over V at once


@dataclass(frozen=True)
class Sampling:
    """Sampling and stopping parameters.

    `temperature` 0 is greedy. `top_k`, `top_p` (Holtzman et al., arXiv:1904.09751) and `min_p` (Nguyen et al.,
    arXiv:2407.01082) truncate the distribution in that order, after the temperature. `stop` strings end a completion
    and are removed from its text; `stop_ids` end it and stay in its ids.

    Raises:
        UserError: if a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a fraction above 0 and at most 1 (off)")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p is {self.min_p}; give 0 (off) or a fraction below 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to 2^64 - 1")
        if any(not text for text in self.stop):
            raise UserError("a stop string is empty; give at least one character")

    @property
    def truncates(self) -> bool:
        """Whether any parameter truncates the distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """Return `count` float64 numbers in [0, 1) for one sample, from Philox keyed by (seed, sample)."""
    key = np.array([seed, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


@dataclass(frozen=True)
class Chosen:
    """A token for each row, its log-probability and the entropy in nats; see `choose`."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]


def chosen_from(logits_BV: Tensor, samplings: Sequence[Sampling], uniform_B: Sequence[float]) -> Chosen:
    """What `choose` chooses, as lists."""
    return Chosen(*(found.tolist() for found in choose(logits_BV, samplings, uniform_B)))


def choose(
    logits_BV: Tensor, samplings: Sequence[Sampling], uniform_B: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row; overwrites the logits.

    Returns:
        ids [B] int64; log-probabilities [B] float32 of those ids at the row's temperature but *before* truncation (as a
        policy gradient needs: truncation is not part of the policy); entropies [B] float32 in nats, likewise. A greedy
        row is scored at temperature 1.
    """
    device = logits_BV.device
    temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
    if any(s.temperature not in (0.0, 1.0) for s in samplings):
        logits_BV.div_(temperature[:, None])
    shifted = logits_BV.sub_(logits_BV.amax(-1, keepdim=True))
    weights = shifted.exp()
    total = weights.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(weights, shifted) / total
    drawn = weights
    if any(s.truncates and s.temperature > 0 for s in samplings):
        drawn = weights.clone()
        for row, sampling in enumerate(samplings):
            if sampling.truncates and sampling.temperature > 0:
                _truncate(drawn[row], sampling)
    greedy = torch.tensor([s.temperature == 0 for s in samplings], device=device)
    if greedy.all():
        ids = shifted.argmax(-1)
    else:
        ids = _inverse_cdf(drawn, torch.tensor(list(uniform_B), dtype=torch.float64, device=device))
        if greedy.any():
            ids = torch.where(greedy, shifted.argmax(-1), ids)
    logprobs = shifted.gather(1, ids[:, None])[:, 0] - total.log()
    return ids, logprobs, entropy


def _truncate(weights_V: Tensor, sampling: Sampling) -> None:
    """Zero in place the entries that top-k, top-p and min-p exclude; the likeliest entry always stays."""
    if sampling.top_k and sampling.top_k < weights_V.numel():
        weights_V[weights_V < weights_V.topk(sampling.top_k).values[-1]] = 0
    if sampling.top_p < 1:
        ordered, index = weights_V.sort(descending=True)
        before = ordered.double().cumsum(0) - ordered
        weights_V[index[before >= sampling.top_p * ordered.double().sum()]] = 0
    if sampling.min_p:
        weights_V[weights_V < sampling.min_p * weights_V.max()] = 0


def _inverse_cdf(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the first entry where the cumulative weight exceeds uniform * total, [B] int64."""
    rows, size = weights_BV.shape
    padding = -size % BLOCK
    blocks = torch.nn.functional.pad(weights_BV, (0, padding)).view(rows, -1, BLOCK)
    per_block = blocks.sum(-1).double().cumsum(-1)
    target = uniform_B * per_block[:, -1]
    block = torch.searchsorted(per_block, target[:, None], right=True).clamp_(max=per_block.shape[1] - 1)
    before = torch.where(block > 0, per_block.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = blocks[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    # float32 block sums and float64 running sums differ in the last digits: never step past the last positive entry
    left = torch.minimum(target[:, None] - before, torch.nextafter(within[:, -1:], torch.zeros_like(before)))
    entry = torch.searchsorted(within, left, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + entry)[:, 0].clamp_(max=size - 1)
