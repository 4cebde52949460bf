"""Continuous batching: which samples run, and in which pages of the cache (Yu et al., Orca, OSDI 2022; Kwon et al.,
arXiv:2309.06180).

Requests may arrive at any time. A sample joins the batch as soon as there is room and leaves it when it ends; others
wait their turn. A prompt is computed once for all its samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from farthing.engine.cache import PagedCache
from farthing.engine.sampling import uniforms
from farthing.engine.sequence import Fresh, Job, Request, Running

PREFILL_TOKENS = 2048  # new prompt tokens computed in one pass at most, which bounds the memory of a pass


class Scheduler:
    """Runs jobs over a cache, at most `max_batch` samples at a time.

    Args:
        guesses: tokens that a sample may reach beyond its end, where some are guessed ahead.
        prefill: computes new prompts and gives each of their samples its first token.
        decode: gives every running sample one more token, or several.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch: int,
        guesses: int,
        prefill: Callable[[Sequence[Fresh]], None],
        decode: Callable[[Sequence[Running]], None],
    ) -> None:
        self.cache, self.max_batch, self.guesses = cache, max_batch, guesses
        self.prefill, self.decode = prefill, decode
        self.waiting: deque[Job] = deque()
        self.running: list[Running] = []

    def add(self, request: Request) -> Job:
        """Queue a request. Its samples fill up as `step` is called; the caller checks that it fits the cache."""
        job = Job(request)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job and free its pages; does nothing to a finished one."""
        if job in self.waiting:
            self.waiting.remove(job)
        for s in [s for s in self.running if s.job is job]:
            self._release(s)
            self.running.remove(s)

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """Run one pass through the network: new prompts if there is room for any, otherwise the next token of every
        running sample.

        Returns:
            the samples finished by this pass.
        """
        fresh = self._admit()
        if fresh:
            self.prefill(fresh)
        elif self.running:
            self.decode(self.running)
        finished = [s for s in self.running if s.done]
        for s in finished:
            if self.cache.routes is not None:
                s.sample.routes = self.cache.read_routes(s.pages, s.length)
            self._release(s)
        self.running = [s for s in self.running if not s.done]
        return finished

    def _admit(self) -> list[Fresh]:
        """Start as many waiting samples as fit."""
        fresh: list[Fresh] = []
        size, budget = self.cache.page_size, PREFILL_TOKENS
        while self.waiting and budget > 0 and (room := self.max_batch - len(self.running)) > 0:
            job = self.waiting[0]
            ids, sampling = list(job.request.ids), job.request.sampling
            prefix = self.cache.find_prefix(ids)
            reach = (len(prefix) + 1) * size
            # a prompt of this pass with the same beginning goes first, and its pages are reused
            alike = len(ids) > reach and any(other.ids[:reach] == ids[:reach] for other in fresh)
            own = -(-(len(ids) + sampling.max_new_tokens + self.guesses) // size) - len(prefix)
            whole = len(ids) // size - len(prefix)  # full prompt pages that are new: shared by the samples
            extra = own - whole
            count = min(job.waiting, room, (self.cache.available - whole) // extra)
            if alike or count < 1:
                self.cache.release(prefix)
                break
            shared = prefix + self.cache.take(whole)
            fresh.append(Fresh(ids, len(prefix) * size, []))
            for number in range(job.started, job.started + count):
                if number > job.started:
                    for page in shared:
                        self.cache.users[page] += 1
                draws = uniforms(sampling.seed, job.request.first_sample + number, sampling.max_new_tokens)
                pages = shared + self.cache.take(extra)
                s = Running(job, job.samples[number], draws.tolist(), pages, len(ids))
                self.running.append(s)  # from here on its pages are freed whatever happens
                fresh[-1].samples.append(s)
            job.started += count
            budget -= len(ids) - fresh[-1].cached
            if not job.waiting:
                self.waiting.popleft()
        return fresh

    def _release(self, s: Running) -> None:
        pages, s.pages = s.pages, []
        self.cache.release(pages)
