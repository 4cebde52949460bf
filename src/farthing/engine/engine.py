"""In-process generation: runs the scheduler's passes over the paged cache.

The engine uses the trainer's own parameters, so weights are never copied between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.engine import compiled
from farthing.engine.cache import Decode, Layout, PagedCache, Prefill, Tiles
from farthing.engine.compiled import CompiledNetwork
from farthing.engine.sampling import Chosen, choose
from farthing.engine.scheduler import Scheduler
from farthing.engine.scores import score_prompt
from farthing.engine.sequence import Job, Prompt, Request, Running, Sample, Work
from farthing.engine.speculate import Guesser
from farthing.model import Decoder
from farthing.model.attention import mean_pairs
from farthing.model.kernels.native.library import NoKernels
from farthing.model.moe import Routing

RIDERS = 24  # prompt tokens that a compiled decoding pass has room for; twice as many where they take half the time


class Engine:
    """Generates with a `Decoder`: up to `max_batch` sequences at a time in `cache_tokens` tokens of cache.

    Args:
        decode: turns ids into text; needed only for stop strings.
        record_routing: store the experts of each sample's tokens in `Sample.routes`, for training that replays them;
            no effect on a model without experts.
        speculate: tokens to guess per step with the model's prediction modules; the output equals plain decoding up to
            rounding.
        quantize: weights of decoding steps: `exact` ones, or `int8` or `int4`. Prompts are read with exact weights.
        reserve, prefill_tokens: see `Scheduler`: by default, for the most tokens in all; a server takes False and some
            hundred, for short waits.

    Raises:
        UserError: if `speculate` exceeds the model's prediction modules.
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
        quantize: str = "exact",
        reserve: bool = True,
        prefill_tokens: int | None = None,
    ) -> None:
        self.decoder, self.stop_ids, self.max_batch, self.decode = decoder, stop_ids, max_batch, decode
        if not 0 <= speculate <= len(decoder.mtp):
            raise UserError(
                f"speculate is {speculate}, but the model has {len(decoder.mtp)} prediction modules; give 0 (off) or "
                "up to that many"
            )
        weight = decoder.embed.weight
        self.dtype = weight.dtype
        pages = -(-cache_tokens // page_size)
        self.capacity = pages * page_size
        self.why_not_compiled = compiled.lacks(decoder, page_size)
        if self.why_not_compiled:
            compiled.refuse(quantize, self.why_not_compiled)

        def cache(layout: type[Layout]) -> PagedCache:
            return PagedCache(
                decoder.config,
                pages + max_batch * -(-speculate // page_size),  # guesses extend past a sequence's end
                page_size,
                weight.dtype if quantize == "exact" else torch.bfloat16,
                weight.device,
                modules=speculate,
                routing=record_routing,
                layout=layout,
            )

        self.network: CompiledNetwork | None = None
        at_a_time = 2 if compiled.rounds_prompts(decoder, quantize) else 1
        riders = 0 if prefill_tokens is None or speculate else min(at_a_time * RIDERS, prefill_tokens)
        if not self.why_not_compiled:
            self.cache = cache(Tiles)
            try:
                self.network = CompiledNetwork(
                    decoder,
                    self.cache,
                    sequences=max_batch + riders,
                    each=1 + speculate,
                    module_each=2 * speculate,
                    modules=speculate,
                    positions=min(self.capacity, decoder.config.max_positions) + speculate,
                    quantize=quantize,
                )
            except NoKernels as error:
                compiled.refuse(quantize, str(error))
                self.why_not_compiled = str(error)
        if self.network is None:
            self.cache = cache(Layout)
        self.speculate = speculate
        self.guesser = Guesser(decoder, self.cache, speculate, self.network) if speculate else None
        self.work = Work()
        self.guessed = self.accepted = 0  # as in `work`, of all the engine's life
        self.version = 0
        self.scheduler = Scheduler(
            self.cache,
            max_batch,
            speculate,
            self._prefill,
            self._decode,
            reserve=reserve,
            prefill_tokens=prefill_tokens,
            riders=riders if self.network is not None else 0,
            at_a_time=at_a_time,
        )

    def generate(
        self,
        requests: Sequence[Request],
        told: Callable[[int, int], None] | None = None,
        ended: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """Return all samples of all requests, in order; other queued requests keep running alongside.

        Args:
            told: called after every pass with the number of requests that are done, and of all.
            ended: called with a request's place and samples as soon as it is done.

        Raises:
            UserError: as `add`, before anything is generated.
        """
        jobs: list[Job] = []
        try:
            for request in requests:
                jobs.append(self.add(request))
            left = dict(enumerate(jobs))
            while left:
                self.step()
                for place in [place for place, job in left.items() if job.done]:
                    job = left.pop(place)
                    if ended is not None:
                        ended(place, job.samples)
                if told is not None:
                    told(len(jobs) - len(left), len(jobs))
        finally:
            for job in jobs:
                self.cancel(job)
        return [job.samples for job in jobs]

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Yield the ids of one sample in small pieces as they come; closing the iterator cancels the request."""
        job, sent = self.add(request), 0
        ids = job.samples[0].ids
        try:
            while sent < len(ids) or not job.done:
                if sent == len(ids):
                    self.step()
                new = ids[sent:]
                sent += len(new)
                if new:
                    yield new  # other requests may add ids before the caller resumes
        finally:
            self.cancel(job)

    def take_weights(self, decoder: Decoder, version: int) -> None:
        """See `Generator`. The engine reads the trainer's own network, so nothing is copied."""
        if version != self.version:
            self.cache.forget()
            self.version = version

    def done(self) -> Work:
        """Return the work since the last call."""
        work, self.work = self.work, Work()
        return work

    def add(self, request: Request) -> Job:
        """Queue a request with the scheduler.

        Raises:
            UserError: if the prompt is empty, if prompt and new tokens exceed the cache or the model's positions, or if
                there are stop strings but no tokenizer.
        """
        if not request.ids:
            raise UserError("the prompt is empty; give at least one token")
        need = len(request.ids) + request.sampling.max_new_tokens
        if need > self.capacity:
            raise UserError(
                f"a prompt of {len(request.ids)} tokens plus {request.sampling.max_new_tokens} new ones needs {need} "
                f"tokens of cache, but the cache holds {self.capacity}; shorten the prompt or raise cache_tokens"
            )
        limit = self.decoder.config.max_positions
        if need > limit:
            raise UserError(
                f"a prompt of {len(request.ids)} tokens plus {request.sampling.max_new_tokens} new ones needs {need} "
                f"positions, but the model supports {limit}; shorten the prompt or lower max_new_tokens"
            )
        if request.sampling.stop and self.decode is None:
            raise UserError("stop strings need a tokenizer; give stop token ids instead")
        size = self.decoder.config.vocab_size
        if wrong := [token for token, _ in request.sampling.logit_bias if not 0 <= token < size]:
            raise UserError(f"logit_bias has the token {wrong[0]}; the model's are 0 to {size - 1}")
        return self.scheduler.add(request)

    def step(self) -> list[Running]:
        """Run one pass; see `Scheduler.step`."""
        return self.scheduler.step()

    def cancel(self, job: Job) -> None:
        """Stop a job and free its pages; see `Scheduler.cancel`."""
        self.scheduler.cancel(job)

    def _prefill(self, prompts: Sequence[Prompt]) -> None:
        """Run one pass over parts of prompts, and choose the first token of each sample of those that end."""
        if self.network is not None:
            self.network.refresh()
        attend = Prefill(
            self.cache, [p.samples[0].pages for p in prompts], [(p.read, p.end) for p in prompts]
        )
        tokens = torch.tensor([t for p in prompts for t in p.ids[p.read : p.end]], device=attend.slots.device)
        hidden = self._hidden(tokens, attend.positions, attend)
        self.work.computed_tokens += len(tokens)
        self.work.pairs += attend.pairs
        if self.guesser is not None:
            self.guesser.read_prompts(attend, prompts, hidden, self.work)
        parts = hidden.split([p.new for p in prompts])
        for prompt, rows in zip(prompts, parts, strict=True):
            if not prompt.job.scored:
                self.work.scored_tokens += score_prompt(self.decoder, prompt, rows)
        self._start_samples(prompts, parts)

    def _start_samples(self, prompts: Sequence[Prompt], parts: Sequence[Tensor]) -> None:
        """Choose the first token of each sample of the prompts that end, from what a pass has read of each, [tokens,
        C]."""
        ended = [(p, rows[-1]) for p, rows in zip(prompts, parts, strict=True) if p.ends]
        if not ended:
            return
        logits = self.decoder.logits(torch.stack([last for _, last in ended]).to(self.dtype))
        self.work.scored_tokens += len(ended)
        self.work.prompt_tokens += sum(len(p.ids) * len(p.samples) for p, _ in ended)
        samples = [s for p, _ in ended for s in p.samples]
        of = torch.tensor([row for row, (p, _) in enumerate(ended) for _ in p.samples])
        self._append(samples, choose(logits[of], [s.row() for s in samples]))

    def _decode(self, running: Sequence[Running], prompts: Sequence[Prompt] = ()) -> None:
        """Run one pass over every sequence's next token and its guesses, and over parts of prompts.

        Each sequence gets one new token and one more for each correct guess.
        """
        if self.guesser is not None:
            self.guesser.guess(running, self.work)
        each = 1 + self.speculate
        tables, positions = [s.pages for s in running], [range(s.length, s.length + each) for s in running]
        ids = [t for s in running for t in (s.next_id, *s.guesses)]
        draws = [s.row(ahead) for s in running for ahead in range(each)]
        rows = len(ids)
        for p in prompts:
            tables += [p.samples[0].pages] * p.new
            positions += [range(at, at + 1) for at in range(p.read, p.end)]
            ids += p.ids[p.read : p.end]
        if self.network is not None:
            self.network.place(tables, positions)
            chosen, hidden = self.network.decode(ids, draws)
            if self.cache.routes is not None:
                slots = self.network.slots(len(ids))
                self.cache.write_routes(slots, self.network.routes(len(ids)))
        else:
            attend = Decode(self.cache, tables, positions)
            hidden = self._hidden(torch.tensor(ids, device=attend.slots.device), attend.positions, attend)
            chosen = choose(self.decoder.logits(hidden), draws)
        self.work.computed_tokens += len(ids)
        self.work.scored_tokens += rows
        self.work.decode_pairs += mean_pairs(
            [(at, at + 1) for row in positions for at in row], self.cache.windows
        )
        counts = self._append(running, chosen)
        own, *parts = hidden.split([rows, *(p.new for p in prompts)])
        for s, count, new in zip(running, counts, own.split(each), strict=True):
            s.length += count
            if self.guesser is not None:
                self.guesser.remember(s, new[:count])
        for p, new in zip(prompts, parts, strict=True):
            if not p.job.scored:
                score_prompt(self.decoder, p, new.to(self.dtype))
        self._start_samples(prompts, parts)

    def _hidden(self, ids_N: Tensor, positions_N: Tensor, attend: Decode | Prefill) -> Tensor:
        routing = Routing() if self.cache.routes is not None else None
        hidden_NC = self.decoder.hidden(ids_N, positions_N, attend, routing)
        if routing is not None:
            self.cache.write_routes(attend.slots, routing.chosen)
        return hidden_NC

    def _append(self, sequences: Sequence[Running], chosen: Chosen) -> list[int]:
        """Add each sequence's chosen tokens up to and including the first wrong guess.

        Returns:
            The number of tokens added to each sequence.
        """
        each = len(chosen.ids) // len(sequences)
        rows = list(zip(chosen.ids, chosen.logprobs, chosen.entropies, chosen.top, strict=True))
        counts = []
        for start, s in zip(range(0, len(rows), each), sequences, strict=True):
            before = len(s.sample.ids)
            for depth, row in enumerate(rows[start : start + each]):
                self._add_token(s, *row)
                if s.done or s.one_by_one or depth == each - 1:
                    break
                self.work.guessed[depth] += 1
                self.guessed += 1
                if row[0] != s.guesses[depth]:
                    break
                self.work.accepted[depth] += 1
                self.accepted += 1
            counts.append(len(s.sample.ids) - before)
        self.work.new_tokens += sum(counts)
        return counts

    def _add_token(
        self, s: Running, token: int, logprob: float, entropy: float, top: list[tuple[int, float]]
    ) -> None:
        s.next_id = token
        sample = s.sample
        sample.entropy += (entropy - sample.entropy) / (len(sample.ids) + 1)
        sample.ids.append(token)
        sample.logprobs.append(logprob)
        if s.sampling.top_logprobs:
            sample.top.append(top)
        if s.constraint is not None:
            s.constraint.take(token)
        if self._stops(s, token):
            sample.finish_reason = "stop"

    def _stops(self, s: Running, token: int) -> bool:
        """Whether a sample ends with its last token."""
        return (
            (token in self.stop_ids and not s.sampling.ignore_eos)
            or token in s.sampling.stop_ids
            or (s.constraint is not None and s.constraint.done)
            or self._at_stop_string(s)
        )

    def _at_stop_string(self, s: Running) -> bool:
        if not s.sampling.stop:
            return False
        assert self.decode is not None
        # every token is at least one byte of text, except special tokens, which have none
        window = 8 + max(len(text.encode()) for text in s.sampling.stop)
        tail = self.decode(s.sample.ids[-window:])
        return any(text in tail for text in s.sampling.stop)
