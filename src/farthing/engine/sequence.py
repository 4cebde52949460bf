"""Inputs and outputs of the engine: requests, samples, work done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from farthing.engine.constraint import Constraint
from farthing.engine.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt and the number of samples to draw; sample i draws from its own stream of the sampling seed."""

    ids: Sequence[int]
    sampling: Sampling
    samples: int = 1
    first_sample: int = 0  # number of the first sample, so that requests can share a seed but not draws
    owner: str = ""
    score_prompt: bool = False
    constrain: Callable[[], Constraint] | None = None


@dataclass
class Sample:
    """One completion: its token ids (including a stop token), their log-probabilities and mean entropy in nats."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    entropy: float = 0.0
    finish_reason: str = "length"  # or "stop"
    # Chosen experts, [tokens, layers with experts, experts per token] uint8 or int16, if recorded: for the prompt, then
    # for all new tokens except the last, which never went through the network.
    routes: Tensor | None = None


@dataclass
class Work:
    """Work done since the last report: tokens through the network and (query, key) pairs attended in a layer, the mean
    over the layers."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0  # tokens whose logits were computed
    pairs: float = 0  # for prompts
    decode_pairs: float = 0  # for new tokens, where latent attention uses its absorbed form
    # the same for all prediction modules together
    module_tokens: int = 0
    module_scored: int = 0
    module_pairs: float = 0
    module_decode_pairs: float = 0
    # by depth: guesses compared with the network's choice, and those that were right
    guessed: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return Work(**{name: mine + getattr(other, name) for name, mine in vars(self).items()})

    @property
    def acceptance(self) -> list[float]:
        """Share of right guesses by depth, among those compared: a guess is compared if all guesses before it were
        right and its sequence had not ended."""
        return [self.accepted[depth] / count for depth, count in sorted(self.guessed.items())]


@dataclass(eq=False)
class Job:
    """A request in progress; `samples` fill up as they are generated."""

    request: Request
    samples: list[Sample] = field(default_factory=list)
    started: int = 0  # number of samples started
    cached: int = 0
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = [Sample() for _ in range(self.request.samples)]

    @property
    def waiting(self) -> int:
        """Number of samples not yet started."""
        return self.request.samples - self.started

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(ended(sample, self.request.sampling) for sample in self.samples)


def ended(sample: Sample, sampling: Sampling) -> bool:
    """Return whether a sample has reached a stop or its last allowed token."""
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
    guesses: list[int] = field(default_factory=list)  # guessed tokens after next_id
    recent: Tensor | None = None  # the network's output for the last cached tokens, [tokens, C]

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's ids."""
        return self.job.request.ids

    @property
    def sampling(self) -> Sampling:
        """The request's sampling parameters."""
        return self.job.request.sampling

    @property
    def done(self) -> bool:
        """Whether the sample has ended; see `ended`."""
        return ended(self.sample, self.sampling)

    def token(self, position: int) -> int:
        """Return the token at a position, which may be a guess."""
        for part in (self.prompt, self.sample.ids, self.guesses):
            if position < len(part):
                return part[position]
            position -= len(part)
        raise IndexError(position)

    def draw(self, ahead: int = 0) -> float:
        """Return the uniform number for the token `ahead` positions after the next one; arbitrary past the end."""
        return self.draws[min(len(self.sample.ids) + ahead, len(self.draws) - 1)]


@dataclass
class NewPrompt:
    """A prompt to compute: its ids, the number already cached, and the samples that start with it."""

    ids: list[int]
    cached: int
    samples: list[Running]
