"""From logits to a token: bias and penalties, temperature, truncation, and one uniform number per token.

The uniform numbers of a sample come from a counter-based generator keyed by (seed, sample), so a sample does not depend
on the rest of the batch or on interruptions of the run.

Shapes: B sequences, V vocabulary, R of the B rows, K likeliest entries, N rows cut by
top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from farthing.base.errors import UserError

BLOCK = 512  # the cumulative sum is searched in two steps, blocks then entries, instead of over V at once
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """Sampling and stopping parameters.

    `temperature` 0 is greedy. `top_k`, `top_p` (Holtzman et al., arXiv:1904.09751) and `min_p` (Nguyen et al.,
    arXiv:2407.01082) truncate the distribution in that order, after the temperature. `stop` strings end a completion
    and are removed from its text; `stop_ids` end it and stay in its ids; `ignore_eos` goes on past the model's own.

    Before the temperature, `repetition_penalty` (Keskar et al., arXiv:1909.05858) divides the positive logits of tokens
    in the prompt or the completion, and multiplies the negative ones; `frequency_penalty` and `presence_penalty` are
    subtracted from the logits of the completion's tokens, the one for each occurrence, the other once; `logit_bias`
    holds (token, number to add) pairs.

    `top_logprobs` is how many of the likeliest tokens to record beside each chosen one.

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
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= (penalty := getattr(self, name)) <= 2:
                raise UserError(f"{name} is {penalty}; give a number from -2 to 2")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; give a number above 0 (1 is off)"
            )
        if wrong := [bias for _, bias in self.logit_bias if not -100 <= bias <= 100]:
            raise UserError(f"logit_bias has the bias {wrong[0]}; give numbers from -100 to 100")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise UserError(
                f"top_logprobs is {self.top_logprobs}; give a number from 0 to {MOST_TOP_LOGPROBS}"
            )

    @property
    def truncates(self) -> bool:
        """Whether any parameter truncates the distribution."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether a token's chance depends on the tokens before it other than through the network."""
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1


def uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """Return `count` float64 numbers in [0, 1) for one sample, from Philox keyed by (seed, sample)."""
    key = np.array([seed, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class Row(NamedTuple):
    """What a token depends on beside its logits: the parameters, a uniform number, the tokens so far, and which may
    come next (`engine.constraint`)."""

    sampling: Sampling
    uniform: float
    prompt: Sequence[int] = ()
    completion: Sequence[int] = ()
    mask: np.ndarray | None = None

    @property
    def adjusted(self) -> bool:
        """Whether the token is drawn from other logits than the network's."""
        return self.mask is not None or self.sampling.penalizes or bool(self.sampling.logit_bias)

    @property
    def plain(self) -> bool:
        """Whether logits, temperature and uniform number suffice."""
        return not (self.adjusted or self.sampling.truncates or self.sampling.top_logprobs)


@dataclass(frozen=True)
class Chosen:
    """A token for each row, its log-probability, the entropy in nats, and the likeliest tokens with theirs; see
    `choose`."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    top: list[list[tuple[int, float]]]

    def put(self, rows: Sequence[int], other: Chosen) -> None:
        """Replace what was chosen for these rows."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            for row, value in zip(rows, theirs, strict=True):
                mine[row] = value


def choose(logits_BV: Tensor, rows: Sequence[Row]) -> Chosen:
    """Draw one token per row; overwrites the logits.

    Log-probabilities and entropies are the policy's: at the row's temperature but *before* truncation (as a policy
    gradient needs: truncation is not part of the policy), and also before penalties, bias and constraints, as OpenAI's
    API reports them, so a token that these forced may have a small one. A greedy row is scored at temperature 1.
    """
    device = logits_BV.device
    samplings = [row.sampling for row in rows]
    temperature_B = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
    adjusted = [number for number, row in enumerate(rows) if row.adjusted]
    adjusted_RV = adjust(logits_BV[adjusted], [rows[number] for number in adjusted]) if adjusted else None
    if any(s.temperature not in (0.0, 1.0) for s in samplings):
        logits_BV.div_(temperature_B[:, None])
    shifted_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True))
    weights_BV = shifted_BV.exp()
    total_B = weights_BV.sum(-1)
    entropy_B = total_B.log() - torch.linalg.vecdot(weights_BV, shifted_BV) / total_B
    likeliest_B = shifted_BV.argmax(-1)
    if adjusted_RV is not None:
        likeliest_B[adjusted] = adjusted_RV.argmax(-1)
        adjusted_RV.div_(temperature_B[adjusted, None])
        weights_BV[adjusted] = adjusted_RV.sub_(adjusted_RV.amax(-1, keepdim=True)).exp_()
    truncated = [number for number, s in enumerate(samplings) if s.truncates]
    if truncated:
        weights_BV[truncated] = truncate(weights_BV[truncated], [samplings[number] for number in truncated])
    greedy_B = torch.tensor([s.temperature == 0 for s in samplings], device=device)
    if greedy_B.all():
        ids_B = likeliest_B
    else:
        uniform_B = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=device)
        ids_B = torch.where(greedy_B, likeliest_B, _inverse_cdf(weights_BV, uniform_B))
    logprobs_B = shifted_BV.gather(1, ids_B[:, None])[:, 0] - total_B.log()
    top = top_logprobs(shifted_BV, total_B.log(), [s.top_logprobs for s in samplings])
    return Chosen(ids_B.tolist(), logprobs_B.tolist(), entropy_B.tolist(), top)


def top_logprobs(scores_BV: Tensor, total_B: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each row, as many as it asks for, with their log-probabilities: scores less the row's
    total."""
    if not any(counts):
        return [[] for _ in counts]
    values_BK, ids_BK = scores_BV.topk(min(max(counts), scores_BV.shape[-1]))
    found = zip(ids_BK.tolist(), (values_BK - total_B[:, None]).tolist(), counts, strict=True)
    return [list(zip(ids[:count], logprobs[:count], strict=True)) for ids, logprobs, count in found]


def adjust(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Apply penalties, bias and masks in place, and return the logits."""
    penalized, device = [], logits_RV.device
    for number, (sampling, _, prompt, completion, _) in enumerate(rows):
        if not sampling.penalizes:
            continue
        made, counts = np.unique(np.asarray(completion, np.int64), return_counts=True)
        ids = np.union1d(np.asarray(prompt, np.int64), made) if sampling.repetition_penalty != 1 else made
        minus = np.zeros(len(ids), np.float32)
        minus[np.searchsorted(ids, made)] = sampling.frequency_penalty * counts + sampling.presence_penalty
        penalized.append(
            (np.full(len(ids), number), ids, minus, np.full(len(ids), sampling.repetition_penalty))
        )
    if penalized:
        row_N, id_N, minus_N, factor_N = (
            torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*penalized, strict=True)
        )
        found_N = logits_RV[row_N, id_N]
        found_N = torch.where(found_N > 0, found_N / factor_N, found_N * factor_N).to(found_N.dtype)
        logits_RV[row_N, id_N] = found_N - minus_N
    for number, row in enumerate(rows):
        if row.sampling.logit_bias:
            tokens, biases = zip(*row.sampling.logit_bias, strict=True)
            bias = torch.tensor(biases, dtype=logits_RV.dtype, device=device)
            logits_RV[number].index_add_(0, torch.tensor(tokens, device=device), bias)
    masked = [number for number, row in enumerate(rows) if row.mask is not None]
    if masked:
        words = np.stack([row.mask for row in rows if row.mask is not None])
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : logits_RV.shape[1]]
        allowed_RV = torch.from_numpy(bits.astype(bool)).to(device)
        logits_RV[masked] = logits_RV[masked].masked_fill_(~allowed_RV, -torch.inf)
    return logits_RV


def truncate(weights_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Zero in place the entries that top-k, top-p and min-p exclude, and return the weights; the likeliest entry always
    stays, and so do entries equal to one that does."""
    size = weights_RV.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=weights_RV.device, dtype=torch.float64)[:, None]

    least_R1 = weights_RV.amax(-1, keepdim=True) * column([s.min_p for s in samplings]).float()
    wanted = [min(s.top_k or size, size) for s in samplings]
    if cut := [k for k in wanted if k < size]:
        likeliest_RK = weights_RV.topk(max(cut)).values
        kth_R1 = likeliest_RK.gather(1, column([min(k, max(cut)) - 1 for k in wanted]).long())
        kth_R1.masked_fill_(column(wanted) == size, 0)
        weights_RV.masked_fill_(weights_RV < kth_R1, 0)
    if nuclear := [number for number, s in enumerate(samplings) if s.top_p < 1]:
        shares_N1 = column([samplings[number].top_p for number in nuclear])
        last_N1 = _last_within(weights_RV[nuclear], shares_N1)
        least_R1[nuclear] = torch.maximum(least_R1[nuclear], last_N1)
    return weights_RV.masked_fill_(weights_RV < least_R1, 0)


def _last_within(weights_RV: Tensor, shares_R1: Tensor) -> Tensor:
    """The smallest weight, [R, 1], such that all larger ones together have less than a share of the row's mass.

    A sort of V entries would take many times longer, so only those are sorted whose first 16 bits are the answer's.
    """
    bits_RV = weights_RV.view(torch.int32) >> 16  # rises with the weight, of which none is negative
    most = int(bits_RV.max())
    mass = torch.zeros(len(weights_RV), most + 1, dtype=torch.float64, device=weights_RV.device)
    mass = mass.scatter_add_(1, bits_RV.long(), weights_RV.double()).flip(-1)  # largest weights first
    upto = mass.cumsum(-1)
    target_R1 = shares_R1 * upto[:, -1:]
    place_R1 = (upto < target_R1).sum(-1, keepdim=True)
    left_R1 = target_R1 - (upto - mass).gather(1, place_R1)
    found = []
    for weights, same, left in zip(weights_RV, bits_RV == most - place_R1, left_R1, strict=True):
        ordered = weights[same].sort(descending=True).values
        before = ordered.double().cumsum(0) - ordered
        found.append(ordered[(before < left).sum().clamp(min=1) - 1])
    return torch.stack(found)[:, None]


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
