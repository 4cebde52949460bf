"""What goes in and out of the engine: requests, samples, the work that was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from farthing.engine.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt and how many samples of it are wanted; sample i draws from its own stream of the sampling
    seed."""

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
    """What the engine has done since it was last booked: tokens through the network and (query, key) pairs
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


@dataclass
class Running:
    """A sample on its way."""

    request: int
    number: int
    prompt: Sequence[int]
    sample: Sample
    sampling: Sampling
    draws: Sequence[float]
    pages: list[int]
    length: int  # tokens in the cache
    next_id: int = -1  # chosen, not yet in the cache
    guesses: list[int] = field(default_factory=list)  # of the tokens after it
    recent: Tensor | None = None  # the network's output for the last tokens in the cache, [some, C]

    @property
    def done(self) -> bool:
        """Whether it has come to a stop, or to its last token."""
        return self.sample.finish_reason == "stop" or len(self.sample.ids) == self.sampling.max_new_tokens

    def token(self, position: int) -> int:
        """The token at a position, which may be one that is only guessed."""
        for part in (self.prompt, self.sample.ids, self.guesses):
            if position < len(part):
                return part[position]
            position -= len(part)
        raise IndexError(position)

    def draw(self, ahead: int = 0) -> float:
        """The uniform number for its next token or, `ahead`, one after it; any where it ends before that."""
        return self.draws[min(len(self.sample.ids) + ahead, len(self.draws) - 1)]
