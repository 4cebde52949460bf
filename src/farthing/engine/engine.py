"""Generation: continuous batching over the paged cache.

Sequences join the batch as soon as there is room and leave it when they end; the weights are the trainer's
own parameters, so there is nothing to synchronise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farthing.cost.flops import forward_flops
from farthing.cost.meter import Span
from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.engine.sampling import Sampling, choose, uniforms
from farthing.errors import UserError
from farthing.model import Decoder

PREFILL_TOKENS = 2048  # new prompt tokens computed in one pass at most, which bounds the memory of a pass


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


@dataclass
class Work:
    """What the engine has done since it was last booked: tokens through the network and (query, key) pairs
    attended."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0  # tokens whose logits were computed
    pairs: int = 0


@dataclass
class _Sequence:
    request: int
    number: int
    sample: Sample
    sampling: Sampling
    draws: list[float]
    pages: list[int]
    length: int  # tokens in the cache
    next_id: int = -1


class Engine:
    """Generates with a `Decoder`, at most `max_batch` sequences at a time, in `cache_tokens` tokens of cache.

    Args:
        decode: turns ids into text; needed only for stop strings.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_ids: frozenset[int] = frozenset(),
        *,
        max_batch: int = 32,
        cache_tokens: int = 32_768,
        page_size: int = 16,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.decoder, self.stop_ids, self.max_batch, self.decode = decoder, stop_ids, max_batch, decode
        weight = decoder.embed.weight
        self.cache = PagedCache(
            decoder.config, -(-cache_tokens // page_size), page_size, weight.dtype, weight.device
        )
        self.capacity = len(self.cache.users) * page_size
        self.work = Work()
        self._weights_seen = -1

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """All samples of all requests, in their order.

        Raises:
            UserError: for an empty prompt, or one that does not fit the cache together with its new tokens.
        """
        results: list[list[Sample]] = [[] for _ in requests]
        for sequence in self._run(requests):
            if sequence is not None:
                results[sequence.request].append(sequence.sample)
        return results

    def stream(self, request: Request) -> Iterator[list[int]]:
        """The ids of one sample as they come, in small pieces; closing the iterator stops the work."""
        shown = 0
        running: list[_Sequence] = []
        for _ in self._run([request], running):
            ids = running[0].sample.ids
            if len(ids) > shown:
                yield ids[shown:]
                shown = len(ids)

    def book(self, span: Span, hf_config: Mapping[str, Any]) -> None:
        """Add the tokens and FLOPs of everything since the last booking to a span of the ledger."""
        done, self.work = self.work, Work()
        span.tokens_in += done.prompt_tokens
        span.tokens_out += done.new_tokens
        span.flops += forward_flops(hf_config, done.computed_tokens, done.pairs, done.scored_tokens)

    def _run(
        self, requests: Sequence[Request], seen: list[_Sequence] | None = None
    ) -> Iterator[_Sequence | None]:
        """Drive the batch; yields None after every step, and at the end every sequence in order."""
        self._check(requests)
        self._notice_new_weights()
        waiting = deque(
            (index, request.first_sample, request.samples) for index, request in enumerate(requests)
        )
        running: list[_Sequence] = []
        everything: list[_Sequence] = seen if seen is not None else []
        try:
            while waiting or running:
                while joined := self._admit(requests, waiting, running):
                    everything += joined
                    running = self._retire(running)
                    yield None
                if waiting and not running:
                    raise RuntimeError("another generation holds the cache; finish or close it first")
                if running:
                    self._step(running)
                    running = self._retire(running)
                    yield None
        finally:
            for sequence in running:
                self._release(sequence)
        yield from sorted(everything, key=lambda s: (s.request, s.number))

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.ids:
                raise UserError("a prompt is empty; give at least one token")
            need = len(request.ids) + request.sampling.max_new_tokens
            if need > self.capacity:
                raise UserError(
                    f"a prompt of {len(request.ids)} tokens and {request.sampling.max_new_tokens} new ones "
                    f"need {need} tokens of cache, there are {self.capacity}; "
                    "shorten it or raise cache_tokens"
                )
            limit = self.decoder.config.max_positions
            if need > limit:
                raise UserError(
                    f"a prompt of {len(request.ids)} tokens and {request.sampling.max_new_tokens} new ones need {need} "
                    f"positions, the model was made for {limit}; shorten it or lower max_new_tokens"
                )
            if request.sampling.stop and self.decode is None:
                raise UserError("stop strings need a tokenizer; give stop token ids instead")

    def _notice_new_weights(self) -> None:
        version = sum(parameter._version for parameter in self.decoder.parameters())
        if version != self._weights_seen:
            self.cache.forget()
            self._weights_seen = version

    @torch.inference_mode()
    def _admit(
        self, requests: Sequence[Request], waiting: deque[tuple[int, int, int]], running: list[_Sequence]
    ) -> list[_Sequence]:
        """Start as many waiting samples as there is room for, and add them to `running`; a prompt is computed once
        for all that start with it."""
        room = self.max_batch - len(running)
        joined: list[_Sequence] = []
        # of each new prompt: its samples, its ids, tokens already cached
        fresh: list[tuple[list[_Sequence], list[int], int]] = []
        size, budget = self.cache.page_size, PREFILL_TOKENS
        while waiting and room > 0 and budget > 0:
            index, first, left = waiting[0]
            request = requests[index]
            ids, sampling = list(request.ids), request.sampling
            prefix = self.cache.find_prefix(ids)
            reach = (len(prefix) + 1) * size
            if len(ids) > reach and any(tokens[:reach] == ids[:reach] for _, tokens, _ in fresh):
                self.cache.release(prefix)
                break  # a prompt in this very pass begins alike: let it go first and reuse its pages
            own = -(-(len(ids) + sampling.max_new_tokens) // size) - len(prefix)
            whole = len(ids) // size - len(prefix)  # full prompt pages that are new: shared by the samples
            extra = own - whole
            count = min(left, room, (self.cache.available - whole) // extra if extra else left)
            if count < 1:
                self.cache.release(prefix)
                break
            shared = prefix + self.cache.take(whole)
            group = []
            for number in range(first, first + count):
                if number > first:
                    for page in shared:
                        self.cache.users[page] += 1
                draws = uniforms(sampling.seed, number, sampling.max_new_tokens).tolist()
                pages = shared + self.cache.take(extra)
                group.append(_Sequence(index, number, Sample(), sampling, draws, pages, len(ids)))
                running.append(group[-1])  # from here on its pages are given back, whatever happens
            fresh.append((group, ids, len(prefix) * size))
            joined += group
            room -= count
            budget -= len(ids) - len(prefix) * size
            if count == left:
                waiting.popleft()
            else:
                waiting[0] = (index, first + count, left - count)
        if fresh:
            self._prefill(fresh)
        return joined

    def _prefill(self, fresh: list[tuple[list[_Sequence], list[int], int]]) -> None:
        spans = [(cached, len(ids)) for _, ids, cached in fresh]
        attend = Prefill(self.cache, [group[0].pages for group, _, _ in fresh], spans)
        tokens = torch.tensor(
            [t for _, ids, cached in fresh for t in ids[cached:]], device=attend.slots.device
        )
        hidden = self.decoder.hidden(tokens, attend.positions, attend)
        ends = torch.tensor([end - start for start, end in spans]).cumsum(0) - 1
        logits = self.decoder.logits(hidden[ends])
        self.work.computed_tokens += len(tokens)
        self.work.scored_tokens += len(fresh)
        self.work.pairs += sum(
            (end - start) * start + (end - start) * (end - start + 1) // 2 for start, end in spans
        )
        for group, ids, _ in fresh:
            self.work.prompt_tokens += len(ids) * len(group)
            self.cache.remember(ids, group[0].pages)
            partial = len(ids) // self.cache.page_size
            if len(ids) % self.cache.page_size:
                for other in group[1:]:
                    self.cache.copy_page(group[0].pages[partial], other.pages[partial])
        rows = torch.tensor([row for row, (group, _, _) in enumerate(fresh) for _ in group])
        self._append([s for group, _, _ in fresh for s in group], logits[rows])

    @torch.inference_mode()
    def _step(self, running: list[_Sequence]) -> None:
        lengths = [s.length for s in running]
        attend = Decode(self.cache, [s.pages for s in running], lengths)
        device = attend.slots_B.device
        ids = torch.tensor([s.next_id for s in running], device=device)
        hidden = self.decoder.hidden(ids, torch.tensor(lengths, device=device), attend)
        self.work.computed_tokens += len(running)
        self.work.scored_tokens += len(running)
        self.work.pairs += sum(lengths) + len(lengths)
        for sequence in running:
            sequence.length += 1
        self._append(running, self.decoder.logits(hidden))

    def _append(self, sequences: list[_Sequence], logits_BV: Tensor) -> None:
        draws = [s.draws[len(s.sample.ids)] for s in sequences]
        ids, logprobs, entropies = choose(logits_BV, [s.sampling for s in sequences], draws)
        for s, token, logprob, entropy in zip(
            sequences, ids.tolist(), logprobs.tolist(), entropies.tolist(), strict=True
        ):
            s.next_id = token
            sample = s.sample
            sample.entropy += (entropy - sample.entropy) / (len(sample.ids) + 1)
            sample.ids.append(token)
            sample.logprobs.append(logprob)
            if token in self.stop_ids or token in s.sampling.stop_ids or self._at_stop_string(s):
                sample.finish_reason = "stop"
        self.work.new_tokens += len(sequences)

    def _at_stop_string(self, s: _Sequence) -> bool:
        if not s.sampling.stop:
            return False
        assert self.decode is not None
        # a token is at least a byte of text, unless it is special and has none
        window = 8 + max(len(text.encode()) for text in s.sampling.stop)
        tail = self.decode(s.sample.ids[-window:])
        return any(text in tail for text in s.sampling.stop)

    def _retire(self, running: list[_Sequence]) -> list[_Sequence]:
        """Let the finished go and give their pages back."""
        going_on = []
        for s in running:
            if s.sample.finish_reason == "stop" or len(s.sample.ids) == s.sampling.max_new_tokens:
                self._release(s)
            else:
                going_on.append(s)
        return going_on

    def _release(self, s: _Sequence) -> None:
        pages, s.pages = s.pages, []
        self.cache.release(pages)
