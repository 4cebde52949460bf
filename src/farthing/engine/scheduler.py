"""Continuous batching (Yu et al., Orca, OSDI 2022; Kwon et al., arXiv:2309.06180): which samples run, in which pages.

Requests may arrive at any time. A sample joins the batch as soon as there is room and leaves it when it ends; the rest
wait in order. A prompt is computed once for all its samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from farthing.engine.cache import PagedCache
from farthing.engine.sampling import uniforms
from farthing.engine.sequence import Job, NewPrompt, Request, Running

PREFILL_TOKENS = 2048  # bound on new prompt tokens per pass, and thus on its memory; one prompt may exceed it


class Scheduler:
    """Runs jobs over a cache, up to `max_batch` samples at a time.

    Args:
        guesses: number of guessed tokens by which a sample may extend past its end.
        prefill: computes new prompts and adds the first token to each of their samples.
        decode: adds one or more tokens to every running sample.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch: int,
        guesses: int,
        prefill: Callable[[Sequence[NewPrompt]], None],
        decode: Callable[[Sequence[Running]], None],
    ) -> None:
        self.cache, self.max_batch, self.guesses = cache, max_batch, guesses
        self.prefill, self.decode = prefill, decode
        self.waiting: deque[Job] = deque()
        self.running: list[Running] = []

    def add(self, request: Request) -> Job:
        """Queue a request; `step` fills its samples. The caller checks that it fits the cache."""
        job = Job(request)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job and release its pages; no effect on a finished job."""
        if job in self.waiting:
            self.waiting.remove(job)
        for s in [s for s in self.running if s.job is job]:
            self._release(s)
            self.running.remove(s)

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """Run one pass through the network: new prompts if any fit, else the next token of all running samples.

        Returns:
            The samples that this pass finished.
        """
        prompts = self._admit()
        if prompts:
            self.prefill(prompts)
        elif self.running:
            self.decode(self.running)
        finished = [s for s in self.running if s.done]
        for s in finished:
            if self.cache.routes is not None:
                s.sample.routes = self.cache.read_routes(s.pages, s.length)
            self._release(s)
        self.running = [s for s in self.running if not s.done]
        return finished

    def _admit(self) -> list[NewPrompt]:
        """Start as many waiting samples as fit."""
        prompts: list[NewPrompt] = []
        size, budget = self.cache.page_size, PREFILL_TOKENS
        while self.waiting and budget > 0 and (room := self.max_batch - len(self.running)) > 0:
            job = self.waiting[0]
            ids, sampling = list(job.request.ids), job.request.sampling
            prefix = self.cache.find_prefix(ids)
            reach = (len(prefix) + 1) * size
            # wait if a prompt in this pass begins the same way: its pages can be reused in the next
            same_prefix = len(ids) > reach and any(other.ids[:reach] == ids[:reach] for other in prompts)
            new_pages = -(-(len(ids) + sampling.max_new_tokens + self.guesses) // size) - len(prefix)
            whole = len(ids) // size - len(prefix)  # new full prompt pages, shared by the samples
            per_sample = new_pages - whole
            count = min(job.waiting, room, (self.cache.available - whole) // per_sample)
            if same_prefix or count < 1:
                self.cache.release(prefix)
                break
            shared = prefix + self.cache.take(whole)
            prompts.append(NewPrompt(ids, len(prefix) * size, []))
            for number in range(job.started, job.started + count):
                if number > job.started:
                    for page in shared:
                        self.cache.users[page] += 1
                draws = uniforms(sampling.seed, job.request.first_sample + number, sampling.max_new_tokens)
                pages = shared + self.cache.take(per_sample)
                s = Running(job, job.samples[number], draws.tolist(), pages, len(ids))
                self.running.append(s)  # from here on `cancel` releases its pages
                prompts[-1].samples.append(s)
            job.started += count
            budget -= len(ids) - prompts[-1].cached
            if not job.waiting:
                self.waiting.popleft()
        return prompts

    def _release(self, s: Running) -> None:
        pages, s.pages = s.pages, []
        self.cache.release(pages)
