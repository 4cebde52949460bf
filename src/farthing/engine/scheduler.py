"""Continuous batching (Yu et al., Orca, OSDI 2022; Kwon et al., arXiv:2309.06180): which samples run, in which pages.

Requests may arrive at any time. A sample joins the batch as soon as there is room and leaves it when it ends. A prompt
is read once for all its samples; a long one in chunks, between decoding passes or with them (Agrawal et al.,
arXiv:2308.16369).

The owner who has had the fewest tokens comes first (Sheng et al., arXiv:2401.00588), and one who has nothing running
gets a place from the one who has most. Requests of one owner start in order, except that a few may overtake one that
has no room yet. Where pages run out, the youngest samples are put back; they go on later from the tokens that they had,
with the same uniform numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from farthing.engine.cache import PagedCache
from farthing.engine.sampling import uniforms
from farthing.engine.sequence import Job, Prompt, Request, Running

PREFILL_TOKENS = 2048  # bound on new prompt tokens per pass, and thus on its memory; one prompt may exceed it
PIECE = 32  # fewest tokens of a prompt in a pass, if it has as many and the pass has room for them
OVERTAKEN = 16  # requests that may start before an earlier one without room
TRIED = 8  # requests without room that are looked at in a step


class Scheduler:
    """Runs jobs over a cache, up to `max_batch` samples at a time.

    Args:
        guesses: number of guessed tokens by which a sample may extend past its end.
        prefill: reads the next part of prompts, and adds the first token to each sample of those that end.
        decode: adds one or more tokens to every given sample, and reads the next part of the given prompts with them.
        reserve: a sample starts when there are pages for its last token, strictly in order; otherwise it takes them as
            it grows, and its pages are remembered for prompts that go on with it.
        prefill_tokens: the most prompt tokens in a pass, in turns with decoding; None: whole prompts, before decoding
            goes on.
        riders: the most prompt tokens that `decode` can read; if any, prompts have no passes of their own while samples
            are decoded.
        at_a_time: prompt tokens that take as long there as the next token of a sample.

    Attributes:
        preemptions: number of times that a sample was put back.
        looked_up, found: prompt tokens looked up in the cache, and those found.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch: int,
        guesses: int,
        prefill: Callable[[Sequence[Prompt]], None],
        decode: Callable[[Sequence[Running], Sequence[Prompt]], None],
        *,
        reserve: bool = True,
        prefill_tokens: int | None = None,
        riders: int = 0,
        at_a_time: int = 1,
    ) -> None:
        self.cache, self.max_batch, self.guesses = cache, max_batch, guesses
        self.prefill, self.decode = prefill, decode
        self.reserve, self.prefill_tokens = reserve, prefill_tokens
        self.riders, self.at_a_time = riders, at_a_time
        self.waiting: list[Job] = []
        self.prompts: list[Prompt] = []  # of running samples that are not ready
        self.running: list[Running] = []  # oldest first
        self.served: Counter[str] = Counter()  # tokens through the network, by owner
        self.preemptions = self.looked_up = self.found = 0
        self._decode_next = False

    def add(self, request: Request) -> Job:
        """Queue a request; `step` fills its samples. The caller checks that it fits the cache."""
        active = {job.request.owner for job in self.waiting} | {s.owner for s in self.running}
        if not active:
            self.served.clear()
        elif request.owner not in active:  # time in which it asked for nothing gives it no claim
            least = min(self.served[owner] for owner in active)
            self.served[request.owner] = max(self.served[request.owner], least)
        job = Job(request)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job and release its pages; no effect on a finished job."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.prompts = [prompt for prompt in self.prompts if prompt.job is not job]
        for s in [s for s in self.running if s.job is job]:
            self.running.remove(s)
            self._release(s)

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """Run one pass through the network: parts of prompts, or the next token of all samples that are ready.

        Returns:
            The samples that this pass finished.
        """
        self._admit()
        ready = [s for s in self.running if s.ready]
        if self.prompts and not (ready and (self._decode_next or self.riders)):
            parts = self._parts(self.prefill_tokens)
            self.prefill(parts)
            self._advance(parts)
            self._decode_next = self.prefill_tokens is not None
        elif ready:
            self._decode(ready)
            self._decode_next = False
        finished = [s for s in self.running if s.done]
        for s in finished:
            if self.cache.routes is not None:
                s.sample.routes = self.cache.read_routes(s.pages, s.length)
            self._release(s)
        self.running = [s for s in self.running if not s.done]
        return finished

    # ---- admission ----

    def _admit(self) -> None:
        """Start as many waiting samples as there is room for."""
        passed: list[Job] = []
        limit = PREFILL_TOKENS if self.prefill_tokens is None else float("inf")
        while sum(prompt.left for prompt in self.prompts) < limit and (job := self._next(passed)):
            if self._same_beginning(job):
                passed.append(job)
            elif self._start(job):
                for other in passed:
                    other.overtaken += 1
                continue
            elif self._give_place(job):
                continue
            else:
                passed.append(job)
            if self.reserve or len(passed) == TRIED or job.overtaken >= OVERTAKEN:
                break

    def _next(self, passed: Sequence[Job]) -> Job | None:
        """The job to start next, but for those that were passed over: of an owner who runs nothing, else of the one who
        has had least."""
        if not self.waiting:
            return None
        owners = {s.owner for s in self.running}
        return min(
            (job for job in self.waiting if job not in passed),
            key=lambda job: (job.request.owner in owners, self.served[job.request.owner]),
            default=None,
        )

    def _same_beginning(self, job: Job) -> bool:
        """Whether a prompt is being read whose pages a job can use once they are."""
        if not job.scored:  # reads all of its prompt itself, once
            return any(prompt.job is job for prompt in self.prompts)
        ids, size = job.request.ids, self.cache.page_size
        for prompt in self.prompts:
            reach = (prompt.read // size + 1) * size
            if len(ids) > reach and list(ids[:reach]) == prompt.ids[:reach]:
                return True
        return False

    def _start(self, job: Job) -> bool:
        """Start a paused sample of a job, or as many new ones as there is room for; False if there is none."""
        room = self.max_batch - len(self.running)
        if room < 1:
            return False
        cache, size, request = self.cache, self.cache.page_size, job.request
        ids = job.paused[-1].ids if job.paused else list(request.ids)
        prefix = cache.find_prefix(ids) if job.scored else []
        last = len(request.ids) + request.sampling.max_new_tokens if self.reserve else len(ids) + 1
        whole = len(ids) // size - len(prefix)  # new full pages of the prompt, shared by the samples
        per_sample = -(-(last + self.guesses) // size) - len(prefix) - whole
        spare = 0 if self.reserve else len(self.running)  # the running samples' next pages
        fits = (cache.available - spare - whole) // per_sample
        count = min(1 if job.paused else job.waiting, room, fits)
        if count < 1:
            cache.release(prefix)
            return False
        if not job.started:
            job.cached = len(prefix) * size
        prompt = Prompt(ids, len(prefix) * size, [self._sample(job) for _ in range(count)])
        shared = prefix + cache.take(whole)
        for s in prompt.samples:
            if s is not prompt.samples[0]:
                cache.share(shared)
            s.pages, s.epoch = shared + cache.take(per_sample), cache.epoch
        self.running += prompt.samples  # from here on `cancel` releases their pages
        self.prompts.append(prompt)
        if not (job.waiting or job.paused):
            self.waiting.remove(job)
        self.looked_up += len(ids)
        self.found += prompt.read
        self.served[request.owner] += prompt.left
        return True

    def _sample(self, job: Job) -> Running:
        """The next sample of a job to go on."""
        if job.paused:
            return job.paused.pop()
        request, number = job.request, job.started
        job.started += 1
        draws = uniforms(
            request.sampling.seed, request.first_sample + number, request.sampling.max_new_tokens
        )
        return Running(job, job.samples[number], draws.tolist(), job.constraints[number])

    # ---- putting back ----

    def _give_place(self, job: Job) -> bool:
        """Put back the youngest sample of the owner who runs most, if that is several and the job's owner runs none."""
        running = Counter(s.owner for s in self.running)
        owner, most = max(running.items(), key=lambda item: item[1], default=("", 0))
        if most < 2 or job.request.owner in running:
            return False
        self._pause(next(s for s in reversed(self.running) if s.owner == owner))
        return True

    def _grow(self, ready: Sequence[Running]) -> None:
        """Give every sample the pages of its next tokens; puts back the youngest until there are enough."""
        for s in ready:
            while s.ready:
                missing = -(-(s.length + 1 + self.guesses) // self.cache.page_size) - len(s.pages)
                if missing <= self.cache.available:
                    s.pages += self.cache.take(max(0, missing))
                    break
                self._pause(self.running[-1])

    def _pause(self, s: Running) -> None:
        """Take a sample out of the batch, to go on later as if its tokens were part of its prompt."""
        for prompt in self.prompts:
            if s in prompt.samples:
                prompt.samples.remove(s)
        self.prompts = [prompt for prompt in self.prompts if prompt.samples]
        self.running.remove(s)
        self._release(s)
        s.restart()
        s.job.paused.append(s)
        if s.job not in self.waiting:
            self.waiting.insert(0, s.job)
        self.preemptions += 1

    def _release(self, s: Running) -> None:
        """Give up a sample's pages; its full ones are kept for what goes on with the same tokens."""
        if not self.reserve and s.epoch == self.cache.epoch:
            self.cache.remember(s.ids[: s.length], s.pages)
        pages, s.pages = s.pages, []
        self.cache.release(pages)

    # ---- passes ----

    def _parts(self, budget: int | None) -> list[Prompt]:
        """Say which part of the prompts a pass reads, in order of arrival; each gets an even share of the budget."""
        parts: list[Prompt] = []
        for number, prompt in enumerate(self.prompts):
            new = prompt.left
            if budget is not None:
                if budget <= 0:
                    break
                new = min(new, budget, max(PIECE, budget // (len(self.prompts) - number)))
                budget -= new
            prompt.end = prompt.read + new
            parts.append(prompt)
        return parts

    def _decode(self, ready: Sequence[Running]) -> None:
        """Choose the next token of all samples that are ready; parts of prompts may ride along."""
        self._grow(ready)
        ready = [s for s in ready if s.ready]
        if not ready:  # prompts that came earlier hold the pages
            return
        riders = self.at_a_time * (6 + len(ready) // 2)  # keeps a pass below 3 times its usual length
        parts = self._parts(min(self.riders, riders))
        self.decode(ready, parts)
        self._advance(parts)
        for s in ready:
            self.served[s.owner] += 1

    def _advance(self, parts: Sequence[Prompt]) -> None:
        """Note what a pass has read of prompts."""
        for prompt in parts:
            prompt.read = prompt.end
            first, *others = prompt.samples
            if first.epoch == self.cache.epoch:
                self.cache.remember(prompt.ids[: prompt.read], first.pages)
            if prompt.left:
                continue
            partial, rest = divmod(prompt.read, self.cache.page_size)
            for other in others if rest else ():
                self.cache.copy_page(first.pages[partial], other.pages[partial])
            for s in prompt.samples:
                s.length = prompt.read
        self.prompts = [prompt for prompt in self.prompts if prompt.left]
