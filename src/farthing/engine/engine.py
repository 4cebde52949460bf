"""Generation in this process: the passes that the scheduler asks for, over the paged cache.

The weights are the trainer's own parameters, so nothing is copied between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.engine.sampling import choose
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Fresh, Job, Request, Running, Sample, Work
from farthing.engine.speculate import Guesser
from farthing.model import Decoder
from farthing.model.moe import Routing


class Engine:
    """Generates with a `Decoder`, at most `max_batch` sequences at a time, in `cache_tokens` tokens of cache.

    Args:
        decode: turns ids into text; needed only for stop strings.
        record_routing: gives every sample the experts its tokens were sent to (`Sample.routes`); for training that
            replays them. Without experts there is nothing to record.
        speculate: tokens to guess a step with the model's prediction modules; the output stays
            that of plain decoding, only rounding differs.

    Raises:
        UserError: when the model has fewer prediction modules than are to guess.
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
        record_routing: bool = False,
        speculate: int = 0,
    ) -> None:
        self.decoder, self.stop_ids, self.max_batch, self.decode = decoder, stop_ids, max_batch, decode
        if not 0 <= speculate <= len(decoder.mtp):
            raise UserError(
                f"speculate is {speculate}, the model has {len(decoder.mtp)} prediction modules; give 0 (off) or at "
                "most as many"
            )
        weight = decoder.embed.weight
        pages = -(-cache_tokens // page_size)
        self.capacity = pages * page_size
        self.cache = PagedCache(
            decoder.config,
            pages + max_batch * -(-speculate // page_size),  # guesses extend beyond a sequence's end
            page_size,
            weight.dtype,
            weight.device,
            modules=speculate,
            routing=record_routing,
        )
        self.speculate = speculate
        self.guesser = Guesser(decoder, self.cache, speculate) if speculate else None
        self.work = Work()
        self.version = 0
        self.scheduler = Scheduler(self.cache, max_batch, speculate, self._prefill, self._decode)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """All samples of all requests, in order; other requests in flight continue alongside.

        Raises:
            UserError: as `add`, before anything is generated.
        """
        jobs: list[Job] = []
        try:
            for request in requests:
                jobs.append(self.add(request))
            while not all(job.done for job in jobs):
                self.scheduler.step()
        finally:
            for job in jobs:
                self.scheduler.cancel(job)
        return [job.samples for job in jobs]

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Yield the ids of one sample as they come, in small pieces; closing the iterator stops the work."""
        job, shown = self.add(request), 0
        ids = job.samples[0].ids
        try:
            while shown < len(ids) or not job.done:
                if shown == len(ids):
                    self.scheduler.step()
                new = ids[shown:]
                shown += len(new)
                if new:
                    yield new  # more may have arrived by the time the caller returns
        finally:
            self.scheduler.cancel(job)

    def take_weights(self, decoder: Decoder, version: int) -> None:
        """As `Generator`; the engine reads the trainer's own network, so there is nothing to copy."""
        if version != self.version:
            self.cache.forget()
            self.version = version

    def done(self) -> Work:
        """The work since this was last asked."""
        done, self.work = self.work, Work()
        return done

    def add(self, request: Request) -> Job:
        """Queue a request with the scheduler.

        Raises:
            UserError: for an empty prompt, one that with its new tokens exceeds the cache or the model's positions,
                and stop strings without a tokenizer.
        """
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
                f"positions, the model has {limit}; shorten it or lower max_new_tokens"
            )
        if request.sampling.stop and self.decode is None:
            raise UserError("stop strings need a tokenizer; give stop token ids instead")
        return self.scheduler.add(request)

    def _prefill(self, fresh: Sequence[Fresh]) -> None:
        """One pass of new prompts; the first token of each of their samples."""
        spans = [(prompt.cached, len(prompt.ids)) for prompt in fresh]
        attend = Prefill(self.cache, [prompt.samples[0].pages for prompt in fresh], spans)
        tokens = torch.tensor(
            [t for prompt in fresh for t in prompt.ids[prompt.cached :]], device=attend.slots.device
        )
        hidden = self._hidden(tokens, attend.positions, attend)
        ends = torch.tensor([end - start for start, end in spans]).cumsum(0) - 1
        logits = self.decoder.logits(hidden[ends])
        self.work.computed_tokens += len(tokens)
        self.work.scored_tokens += len(fresh)
        self.work.pairs += attend.pairs
        if self.guesser is not None:
            self.guesser.read_prompts(attend, fresh, hidden, self.work)
        for prompt in fresh:
            first, *others = prompt.samples
            self.work.prompt_tokens += len(prompt.ids) * len(prompt.samples)
            self.cache.remember(prompt.ids, first.pages)
            partial, rest = divmod(len(prompt.ids), self.cache.page_size)
            for other in others if rest else ():
                self.cache.copy_page(first.pages[partial], other.pages[partial])
        rows = torch.tensor([row for row, prompt in enumerate(fresh) for _ in prompt.samples])
        self._append([s for prompt in fresh for s in prompt.samples], logits[rows])

    def _decode(self, running: Sequence[Running]) -> None:
        """One pass of every sequence's next token and its guesses; one new token each, and as many as were guessed."""
        if self.guesser is not None:
            self.guesser.guess(running, self.work)
        each = 1 + self.speculate
        attend = Decode(
            self.cache, [s.pages for s in running], [range(s.length, s.length + each) for s in running]
        )
        ids = torch.tensor([t for s in running for t in (s.next_id, *s.guesses)], device=attend.slots.device)
        hidden = self._hidden(ids, attend.positions, attend)
        self.work.computed_tokens += len(ids)
        self.work.scored_tokens += len(ids)
        self.work.decode_pairs += attend.pairs
        taken = self._append(running, self.decoder.logits(hidden))
        for s, count, rows in zip(running, taken, hidden.split(each), strict=True):
            s.length += count
            if self.guesser is not None:
                self.guesser.remember(s, rows[:count])

    def _hidden(self, ids_N: Tensor, positions_N: Tensor, attend: Decode | Prefill) -> Tensor:
        routing = Routing() if self.cache.routes is not None else None
        hidden_NC = self.decoder.hidden(ids_N, positions_N, attend, routing)
        if routing is not None:
            self.cache.write_routes(attend.slots, routing.chosen)
        return hidden_NC

    def _append(self, sequences: Sequence[Running], logits_NV: Tensor) -> list[int]:
        """Choose a token after every row, and extend each sequence up to the first token that was not guessed.

        Returns:
            how many tokens each sequence got.
        """
        each = len(logits_NV) // len(sequences)
        rows = [(s, ahead) for s in sequences for ahead in range(each)]
        ids, logprobs, entropies = choose(
            logits_NV, [s.sampling for s, _ in rows], [s.draw(ahead) for s, ahead in rows]
        )
        chosen = list(zip(ids.tolist(), logprobs.tolist(), entropies.tolist(), strict=True))
        taken = []
        for start, s in zip(range(0, len(rows), each), sequences, strict=True):
            before = len(s.sample.ids)
            for depth, (token, logprob, entropy) in enumerate(chosen[start : start + each]):
                self._take(s, token, logprob, entropy)
                if s.done or depth == each - 1:
                    break
                self.work.guessed[depth] += 1
                if token != s.guesses[depth]:
                    break
                self.work.accepted[depth] += 1
            taken.append(len(s.sample.ids) - before)
        self.work.new_tokens += sum(taken)
        return taken

    def _take(self, s: Running, token: int, logprob: float, entropy: float) -> None:
        s.next_id = token
        sample = s.sample
        sample.entropy += (entropy - sample.entropy) / (len(sample.ids) + 1)
        sample.ids.append(token)
        sample.logprobs.append(logprob)
        if token in self.stop_ids or token in s.sampling.stop_ids or self._at_stop_string(s):
            sample.finish_reason = "stop"

    def _at_stop_string(self, s: Running) -> bool:
        if not s.sampling.stop:
            return False
        assert self.decode is not None
        # a token is at least a byte of text, unless it is special and has none
        window = 8 + max(len(text.encode()) for text in s.sampling.stop)
        tail = self.decode(s.sample.ids[-window:])
        return any(text in tail for text in s.sampling.stop)
