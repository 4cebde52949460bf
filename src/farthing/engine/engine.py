"""Generation: continuous batching over the paged cache.

Sequences join the batch as soon as there is room and leave it when they end; the weights are the trainer's
own parameters, so there is nothing to synchronise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farthing.cost.flops import forward_flops, mtp_flops
from farthing.cost.meter import Span
from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.engine.sampling import choose, uniforms
from farthing.engine.sequence import Request, Running, Sample, Work
from farthing.engine.speculate import Guesser
from farthing.errors import UserError
from farthing.model import Decoder
from farthing.model.moe import Routing

PREFILL_TOKENS = 2048  # new prompt tokens computed in one pass at most, which bounds the memory of a pass


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
            pages + max_batch * -(-speculate // page_size),  # guesses reach beyond a sequence's end
            page_size,
            weight.dtype,
            weight.device,
            modules=speculate,
            routing=record_routing,
        )
        self.speculate = speculate
        self.guesser = Guesser(decoder, self.cache, speculate) if speculate else None
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
        running: list[Running] = []
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
        span.flops += forward_flops(hf_config, 0, done.decode_pairs, 0, absorbed=True)
        if done.module_tokens:
            layers = mtp_flops(hf_config, done.module_tokens, done.module_pairs, 0)
            layers += mtp_flops(hf_config, 0, done.module_decode_pairs, 0, absorbed=True)
            span.flops += layers // len(self.decoder.mtp)  # counted as if all read every token
            span.flops += mtp_flops(hf_config, 0, 0, done.module_scored)

    def _run(
        self, requests: Sequence[Request], seen: list[Running] | None = None
    ) -> Iterator[Running | None]:
        """Drive the batch; yields None after every step, and at the end every sequence in order."""
        self._check(requests)
        self._notice_new_weights()
        waiting = deque(
            (index, request.first_sample, request.samples) for index, request in enumerate(requests)
        )
        running: list[Running] = []
        everything: list[Running] = seen if seen is not None else []
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
        self, requests: Sequence[Request], waiting: deque[tuple[int, int, int]], running: list[Running]
    ) -> list[Running]:
        """Start as many waiting samples as there is room for, and add them to `running`; a prompt is computed once
        for all that start with it."""
        room = self.max_batch - len(running)
        joined: list[Running] = []
        # of each new prompt: its samples, its ids, tokens already cached
        fresh: list[tuple[list[Running], list[int], int]] = []
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
            own = -(-(len(ids) + sampling.max_new_tokens + self.speculate) // size) - len(prefix)
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
                group.append(Running(index, number, ids, Sample(), sampling, draws, pages, len(ids)))
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

    def _prefill(self, fresh: list[tuple[list[Running], list[int], int]]) -> None:
        spans = [(cached, len(ids)) for _, ids, cached in fresh]
        attend = Prefill(self.cache, [group[0].pages for group, _, _ in fresh], spans)
        tokens = torch.tensor(
            [t for _, ids, cached in fresh for t in ids[cached:]], device=attend.slots.device
        )
        hidden = self._hidden(tokens, attend.positions, attend)
        ends = torch.tensor([end - start for start, end in spans]).cumsum(0) - 1
        logits = self.decoder.logits(hidden[ends])
        self.work.computed_tokens += len(tokens)
        self.work.scored_tokens += len(fresh)
        self.work.pairs += attend.pairs
        if self.guesser is not None:
            self.guesser.read_prompts(attend, fresh, hidden, self.work)
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
    def _step(self, running: list[Running]) -> None:
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

    def _append(self, sequences: list[Running], logits_NV: Tensor) -> list[int]:
        """Choose a token after every row, and add to each sequence its first ones up to one that was not guessed.

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

    def _retire(self, running: list[Running]) -> list[Running]:
        """Let the finished go and give their pages back."""
        going_on = []
        for s in running:
            if s.done:
                if self.cache.routes is not None:
                    s.sample.routes = self.cache.read_routes(s.pages, s.length)
                self._release(s)
            else:
                going_on.append(s)
        return going_on

    def _release(self, s: Running) -> None:
        pages, s.pages = s.pages, []
        self.cache.release(pages)
