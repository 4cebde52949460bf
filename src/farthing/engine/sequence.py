"""Input and output of the engine: requests, samples, and the work done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from farthing.engine.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt and its number of samples; sample i draws from its own stream of the sampling seed."""

    ids: Sequence[int]
    sampling: Sampling
    samples: int = 1
    # samples are numbered from here, so that requests can share a seed without sharing draws
    first_sample: int = 0


@dataclass
class Sample:
    """One completion: its token ids (a stop token included), their log-probabilities and mean entropy in
    nats."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: float = 0.0
    finish_reason: str = "length"  # or "stop"
    # The experts that the engine chose, [tokens, layers with experts, experts a token] uint8 or int16, if it was asked
    # to record them: of the prompt, then of all new tokens but the last, which never went through the network.
    routes: Tensor | None = None


@dataclass
class Work:
    """Work of the engine since it was last asked: tokens through the network and (query, key) pairs
    attended."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0  # tokens whose logits were computed
    pairs: int = 0  # of prompts
    decode_pairs: int = 0  # of new tokens: latent attention is in its absorbed form
    # the same of all prediction modules together
    module_tokens: int = 0
    module_scored: int = 0
    module_pairs: int = 0
    module_decode_pairs: int = 0
    # by depth: guesses that were compared with the network's choice, and those that were right
    guessed: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)

    @property
    def acceptance(self) -> list[float]:
        """For each depth the share of right guesses among those that were compared; a guess is when all before it were
        right and its sequence had not ended."""
        return [self.accepted[depth] / count for depth, count in sorted(self.guessed.items())]


@dataclass(eq=False)
class Job:
    """A request in flight; `samples` fill up as they are generated."""

    request: Request
    samples: list[Sample] = field(default_factory=list)
    started: int = 0  # of its samples

    def __post_init__(self) -> None:
        self.samples = [Sample() for _ in range(self.request.samples)]

    @property
    def waiting(self) -> int:
        """Samples that have not started."""
        return self.request.samples - self.started

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(ended(sample, self.request.sampling) for sample in self.samples)


def ended(sample: Sample, sampling: Sampling) -> bool:
    """Whether a sample has reached a stop, or its last token."""
    return sample.finish_reason == "stop" or len(sample.ids) == sampling.max_new_tokens


@dataclass(eq=False)
class Running:
    """A sample in the batch."""

    job: Job
    sample: Sample
    draws: Sequence[float]
    pages: list[int]
    length: int  # tokens in the cache
    next_id: int = -1  # chosen, not yet in the cache
    guesses: list[int] = field(default_factory=list)  # of the tokens after it
    recent: Tensor | None = None  # the network's output for the last tokens in the cache, [some, C]

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's ids."""
        return self.job.request.ids

    @property
    def sampling(self) -> Sampling:
        """Settings for choosing its tokens."""
        return self.job.request.sampling

    @property
    def done(self) -> bool:
        """As `ended`."""
        return ended(self.sample, self.sampling)

    def token(self, position: int) -> int:
        """The token at a position, possibly only a guess."""
        for part in (self.prompt, self.sample.ids, self.guesses):
            if position < len(part):
                return part[position]
            position -= len(part)
        raise IndexError(position)

    def draw(self, ahead: int = 0) -> float:
        """The uniform number for its next token or one `ahead` of it; arbitrary beyond its end."""
        return self.draws[min(len(self.sample.ids) + ahead, len(self.draws) - 1)]


@dataclass
class Fresh:
    """A prompt to compute: its ids, how many of them are cached, and the samples that start with it."""

    ids: list[int]
    cached: int
    samples: list[Running]
