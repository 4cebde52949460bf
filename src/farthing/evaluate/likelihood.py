"""Log-likelihoods of given continuations: what a model would have said, without letting it say anything.

A context is computed once for all its continuations. Shapes: N tokens, M scored tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from farthing.base.errors import UserError
from farthing.engine.sequence import Work
from farthing.model import Decoder, Segments

PASS_TOKENS = 4096  # in one pass; a context with one continuation may be longer
ROWS_AT_ONCE = 256  # of logits, which are as wide as the vocabulary

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the sum of its tokens' log-probabilities in nats, and whether it is what greedy decoding would
    have written."""

    logprob: float
    greedy: bool


@dataclass
class _Group:
    """A context, and continuations of it with their places in the answer."""

    context: Ids
    continuations: list[Ids] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(each) - 1 for each in self.continuations)


@torch.inference_mode()
def likelihoods(
    decoder: Decoder,
    pairs: Sequence[tuple[Ids, Ids]],
    told: Callable[[int, int], None] | None = None,
) -> tuple[list[Likelihood], Work]:
    """The likelihood of every (context, continuation).

    A context that is too long for the model with its continuation loses its beginning.

    Args:
        told: called after every pass with the number of continuations that are done, and of all.

    Raises:
        UserError: if a context or a continuation is empty, or a continuation is longer than the model's positions.
    """
    found: list[Likelihood | None] = [None] * len(pairs)
    work, done = Work(), 0
    for groups in _passes(_grouped(pairs, decoder.config.max_positions)):
        for place, likelihood in _one_pass(decoder, groups, work):
            found[place] = likelihood
            done += 1
        if told is not None:
            told(done, len(pairs))
    return [likelihood for likelihood in found if likelihood is not None], work


def _grouped(pairs: Sequence[tuple[Ids, Ids]], positions: int) -> Iterator[_Group]:
    """Continuations by context, shortest contexts first, no group larger than a pass."""
    groups: dict[tuple[int, ...], list[_Group]] = {}
    for place, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise UserError("a context or its continuation is empty; give at least one token of each")
        if len(continuation) > positions:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, but the model has {positions} positions"
            )
        kept = tuple(context[-(positions + 1 - len(continuation)) :])  # the last token needs no position
        same = groups.setdefault(kept, [_Group(kept)])
        if same[-1].continuations and same[-1].tokens + len(continuation) > PASS_TOKENS:
            same.append(_Group(kept))
        same[-1].continuations.append(continuation)
        same[-1].places.append(place)
    yield from sorted((group for same in groups.values() for group in same), key=lambda group: group.tokens)


def _passes(groups: Iterator[_Group]) -> Iterator[list[_Group]]:
    current: list[_Group] = []
    for group in groups:
        if current and sum(each.tokens for each in current) + group.tokens > PASS_TOKENS:
            yield current
            current = []
        current.append(group)
    if current:
        yield current


def _one_pass(decoder: Decoder, groups: Sequence[_Group], work: Work) -> Iterator[tuple[int, Likelihood]]:
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for group in groups:
        ids += group.context
        last = len(ids) - 1
        for continuation in group.continuations:
            start = len(ids)
            ids += continuation[:-1]  # the last one is predicted, and predicts nothing
            rows += [last, *range(start, len(ids))]
            targets += continuation
    segments = Segments(
        [(len(g.context), [len(c) - 1 for c in g.continuations if len(c) > 1]) for g in groups]
    )
    device = decoder.embed.weight.device
    hidden_NC = decoder.hidden(torch.tensor(ids, device=device), segments.positions().to(device), segments)
    work.prompt_tokens += len(ids)
    work.computed_tokens += len(ids)
    work.scored_tokens += len(rows)
    work.pairs += segments.pairs(decoder.config.windows)
    logprobs: list[float] = []
    greedy: list[bool] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        at = torch.tensor(rows[start : start + ROWS_AT_ONCE], device=device)
        target_M = torch.tensor(targets[start : start + ROWS_AT_ONCE], device=device)
        logits = decoder.logits(hidden_NC[at])
        chosen_M = logits.gather(1, target_M[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs += chosen_M.tolist()
        greedy += (logits.argmax(-1) == target_M).tolist()
    start = 0
    for group in groups:
        for place, continuation in zip(group.places, group.continuations, strict=True):
            end = start + len(continuation)
            yield place, Likelihood(sum(logprobs[start:end]), all(greedy[start:end]))
            start = end
