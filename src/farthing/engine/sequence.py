"""Inputs and outputs of the engine: requests, samples, work done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from farthing.engine.constraint import Constraint
from farthing.engine.sampling import Row, Sampling


@dataclass(frozen=True)
class Request:
    """A prompt and the number of samples to draw; sample i draws from its own stream of the sampling seed.

    Attributes:
        first_sample: number of the first sample, so that requests can share a seed but not draws.
        owner: who asks; owners share the engine evenly.
        score_prompt: also find the log-probabilities of the prompt's tokens, at temperature 1.
        constrain: makes the constraint of a sample; each gets its own.
    """

    ids: Sequence[int]
    sampling: Sampling
    samples: int = 1
    first_sample: int = 0
    owner: str = ""
    score_prompt: bool = False
    constrain: Callable[[], Constraint] | None = None


@dataclass
class Sample:
    """One completion: its token ids (including a stop token), their log-probabilities and mean entropy in nats, and
    for each token the likeliest ones, with their log-probabilities, if `Sampling.top_logprobs` asks for them."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: float = 0.0
    finish_reason: str = "length"  # or "stop"
    # Chosen experts, [tokens, layers with experts, experts per token] uint8 or int16, if recorded: for the prompt, then
    # for all new tokens except the last, which never went through the network.
    routes: Tensor | None = None
    top: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class Work:
    """Work done since the last report: tokens through the network and (query, key) pairs attended in a layer, the mean
    over the layers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # tokens of prompts found in the cache
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
    """A request in progress; `samples` fill up as they are generated.

    Attributes:
        started: number of samples started.
        paused: samples that made room for others, and go on later; the one that goes on first is last.
        overtaken: number of times that a later request started before it.
        cached: tokens of the prompt found in the cache when the first sample started.
        prompt_logprobs, prompt_top: if `Request.score_prompt`, as in `Sample`; the first token has none.
    """

    request: Request
    samples: list[Sample] = field(default_factory=list)
    constraints: list[Constraint | None] = field(default_factory=list)
    started: int = 0
    paused: list[Running] = field(default_factory=list)
    overtaken: int = 0
    cached: int = 0
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        constrain, samples = self.request.constrain, range(self.request.samples)
        self.samples = [Sample() for _ in samples]
        self.constraints = [constrain() if constrain is not None else None for _ in samples]

    @property
    def waiting(self) -> int:
        """Number of samples not yet started."""
        return self.request.samples - self.started

    @property
    def scored(self) -> bool:
        """Whether the prompt's log-probabilities are known, if they are wanted."""
        return not self.request.score_prompt or len(self.prompt_logprobs) == len(self.request.ids)

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
    constraint: Constraint | None
    pages: list[int] = field(default_factory=list)
    epoch: int = 0  # the cache's when it started
    length: int = 0  # tokens in the cache, once its prompt is read
    next_id: int = -1  # chosen, not yet in the cache; none until its prompt is read
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
    def owner(self) -> str:
        """Who asked for it."""
        return self.job.request.owner

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return [*self.prompt, *self.sample.ids]

    @property
    def ready(self) -> bool:
        """Whether its prompt has been read."""
        return self.next_id >= 0

    @property
    def done(self) -> bool:
        """Whether the sample has ended; see `ended`."""
        return ended(self.sample, self.sampling)

    @property
    def one_by_one(self) -> bool:
        """Whether a token cannot be chosen before those before it are, even if they were guessed."""
        return self.constraint is not None or self.sampling.penalizes

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

    def row(self, ahead: int = 0) -> Row:
        """What the token `ahead` positions after the next one depends on; see `one_by_one`."""
        mask = None if self.constraint is None or ahead else self.constraint.mask()
        return Row(self.sampling, self.draw(ahead), self.prompt, self.sample.ids, mask)

    def restart(self) -> None:
        """Go back to where nothing of it is in the cache."""
        self.pages, self.length, self.next_id, self.guesses, self.recent = [], 0, -1, [], None


@dataclass(eq=False)
class Prompt:
    """What has to be read before samples can go on: a request's prompt, and what a paused sample had got.

    Attributes:
        read: number of tokens in the cache.
        samples: those that start with it; the first one's pages are written.
        end: where the part ends that a pass reads.
    """

    ids: list[int]
    read: int
    samples: list[Running]
    end: int = 0

    @property
    def job(self) -> Job:
        """The request."""
        return self.samples[0].job

    @property
    def new(self) -> int:
        """Number of tokens that a pass reads."""
        return self.end - self.read

    @property
    def left(self) -> int:
        """Number of tokens to read."""
        return len(self.ids) - self.read

    @property
    def ends(self) -> bool:
        """Whether a pass reads it to its end."""
        return self.end == len(self.ids)
